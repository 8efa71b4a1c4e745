/** The page: starts up, submits requests, and handles user input. */

import { copyText, curl } from "./curl.js";
import { $, announce, changed, isNarrow } from "./elements.js";
import { NUMBERS, fillFields, forgetError, forgetErrors, offerFields, readFields, showError, tellDefaults } from "./form.js";
import { readInputs, take } from "./inputs.js";
import { changeKey, key } from "./key.js";
import { card, chooseModel, loadModels } from "./models.js";
import { makePictures } from "./pictures.js";
import { setRunning } from "./progress.js";
import { describe, emptyFrame, exactly, offerAgain, place, show, shown } from "./result.js";
import { RequestError } from "./server.js";
import { showStatus } from "./status.js";
import { LEFT, makeVideo, rememberedJob, resumeJob } from "./videos.js";

let running = null;    // AbortController of the running request

async function start() {
  await loadModels();
  offerFields();
  changed();
  resume();
}

/** Resumes waiting for the video that this tab was waiting for. */
function resume() {
  const job = rememberedJob();
  if (!job) return;
  if (job.model !== card.id) { chooseModel(job.model); offerFields(); }
  fillFields(job.body, {});
  perform((signal) => resumeJob(job, signal));
}

async function submit() {
  if (running) return;
  forgetErrors();
  if (!card) return start().catch(tellError);
  const wordy = NUMBERS.find((id) => $(id).validity.badInput);
  if (wordy) return showError(new RequestError({ message: "This is not a number.", param: wordy }));
  const asked = { card, body: readFields(), files: readInputs() };
  $("curl").textContent = curl(asked.body, asked.files);
  await perform((signal) => (card.media === "video" ? makeVideo : makePictures)(asked, signal));
}

/** Runs one request and shows its progress and its result. */
async function perform(request) {
  if (running) return;
  const before = shown;
  const { signal } = (running = new AbortController());
  setRunning(true);
  try {
    await request(signal);
    announce("Done.");
  } catch (error) {
    if (signal.aborted) announce("Cancelled.");
    else tellError(error);
    if (shown) describe(shown);
    else if (before) show(before);
    else place([emptyFrame("Nothing to see yet.")]);
  } finally {
    running = null;
    setRunning(false);
    tellCurl();
  }
}

function tellError(error) {
  const isLost = error instanceof TypeError;
  if (isLost) console.info(error);
  showError(isLost ? new RequestError({ message: "The connection was lost. Is the server still running?" }) : error);
}

/** Shows the form's request as a command, unless a result is shown, which has its own. */
function tellCurl() {
  if (shown || running || !card) return;
  const body = readFields();
  $("curl").textContent = curl({ ...body, prompt: body.prompt || $("prompt").placeholder }, readInputs());
}

/* ---- User input ---- */

$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("form").addEventListener("input", ({ target }) => {
  forgetError(target.closest("#lora") ?? target);
  if (!card) return;
  tellDefaults();
  tellCurl();
});
$("model").addEventListener("change", () => {
  chooseModel($("model").value);
  forgetErrors();
  offerFields();
  offerAgain();
  tellCurl();
});
for (const id of ["prompt", "negative_prompt"]) {
  $(id).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
}
$("cancel").onclick = () => running?.abort();
$("reuse").onclick = () => {
  if (shown.card !== card) { chooseModel(shown.card.id); offerFields(); }
  fillFields(exactly(shown), shown.files);
  $("prompt").focus();
};
$("begin-with").onclick = () => {
  take([new File([shown.blob], shown.name, { type: shown.blob.type })]);
  $("prompt").focus();
};
$("same-seed").onclick = () => { $("seed").value = shown.seed; $("settings").open = true; changed($("seed")); $("seed").focus(); };
$("copy").onclick = async () => {
  await copyText($("curl"));
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
};
$("change-key").onclick = changeKey;
document.addEventListener("key", () => { $("change-key").hidden = !key(); tellCurl(); });
$("status").onclick = (event) => {
  if (event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  showStatus().catch(tellError);
};
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && running) { running.abort(); $("prompt").focus(); }
  const isTyping = event.target.closest("input, textarea, select");
  if (event.key === "/" && !isTyping) { event.preventDefault(); $("prompt").select(); }
});
$("made").addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!by) return;
  const buttons = [...$("made").querySelectorAll("button")];
  const next = buttons[buttons.indexOf(event.target) + by];
  event.preventDefault();
  if (next) { next.focus(); next.click(); }
});
// Adapters and models may have been added meanwhile.
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && card && !running) loadModels().then(offerFields).catch(console.info);
});
// The user has left, so the server need not continue the request.
addEventListener("pagehide", () => running?.abort(LEFT));
addEventListener("pageshow", (event) => { if (event.persisted && card) setTimeout(resume); });

$("change-key").hidden = !key();
$("settings").open = !isNarrow();
start().catch(tellError);
