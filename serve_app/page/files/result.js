/** Results: the image that is shown, with its details, and earlier images. */

import { curl } from "./curl.js";
import { $, element } from "./elements.js";
import { callOf } from "./models.js";
import { placeFor } from "./inputs.js";

const STAGES = ["wake", "encode", "prepare", "queue", "denoise", "decode"];
const SOMETIMES = ["wake", "prepare"];    // left out if they took no time
const MOST = 100;           // results that are kept
const made = [];            // {card, body, files, seed, size, timings, forwards, warnings, blob, url, name, isVideo}, the newest last
export let shown = null;    // one of `made`

/** Adds a result. */
export function keep(blob, facts) {
  const words = facts.body.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 48).replace(/^-|-$/g, "");
  const name = `${words || "image"}${facts.seed === null ? "" : `-${facts.seed}`}.${facts.format}`;
  const entry = { ...facts, name, blob, url: URL.createObjectURL(blob) };
  entry.thumbnail = element("button", { type: "button", title: facts.body.prompt, onclick: () => show(entry) }, mediaOf(entry, false));
  made.push(entry);
  $("made").prepend(element("li", {}, entry.thumbnail));
  $("gallery").hidden = false;
  if (made.length > MOST) forget(made.shift());
  return entry;
}

function forget(entry) {
  entry.thumbnail.parentElement.remove();
  URL.revokeObjectURL(entry.url);
}

export function mediaOf(entry, isLarge = true) {
  const alt = `${entry.body.prompt} (seed ${entry.seed})`;
  if (!entry.isVideo) return element("img", { src: entry.url, alt });
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const video = element("video", {
    src: entry.url, muted: true, loop: true, playsInline: true, autoplay: isLarge && !isCalm, controls: isLarge,
  });
  video.setAttribute("aria-label", alt);
  return video;
}

/** Returns a partial image. */
export async function formOf({ b64_json, output_format }) {
  const image = element("img", { src: `data:image/${output_format};base64,${b64_json}`, alt: "" });
  await image.decode();
  return image;
}

export const emptyFrame = (textContent) => element("div", { className: "frame" }, element("p", { className: "empty", textContent }));

/** Shows frames: one large, or several side by side. */
export function place(frames) {
  shown = null;
  $("view").className = frames.length === 1 ? "one" : "";
  $("view").replaceChildren(...frames);
  $("about").hidden = true;
}

/** Puts a finished image into its frame; a click on it shows its details. */
export async function complete(frame, entry) {
  const image = mediaOf(entry);
  await image.decode();
  entry.choice = element("button", { type: "button", onclick: () => describe(entry) }, image);
  frame.replaceChildren(entry.choice);
}

export function show(entry) {
  place([element("div", { className: "frame" }, mediaOf(entry))]);
  describe(entry);
}

/* ---- Details ---- */

export function describe(entry) {
  shown = entry;
  for (const one of made) {
    one.thumbnail.setAttribute("aria-current", one === entry);
    one.choice?.setAttribute("aria-pressed", one === entry);
  }
  $("caption").textContent = entry.body.prompt;
  $("facts").textContent = factsOf(entry).join(" · ");
  $("warnings").replaceChildren(...(entry.warnings ?? []).map((textContent) => element("li", { textContent })));
  $("warnings").hidden = !entry.warnings?.length;
  $("same-seed").hidden = entry.seed === null;
  $("seed-used").textContent = entry.seed;
  $("download").href = entry.url;
  $("download").download = entry.name;
  describeTimes(entry.timings);
  $("curl").textContent = curl(exactly(entry), entry.files, entry.card);
  $("about").hidden = false;
  offerAgain();
}

/** Offers the shown image as an input if the chosen model takes it. */
export function offerAgain() {
  $("begin-with").hidden = !shown || !placeFor(shown.blob.type);
}

function describeTimes(timings) {
  const stages = STAGES.filter((stage) => timings[stage] !== undefined && (timings[stage] || !SOMETIMES.includes(stage)));
  const total = stages.reduce((sum, stage) => sum + timings[stage], 0);
  $("stages").hidden = !total;
  $("stages").replaceChildren(...stages.map((stage) => {
    const part = element("i", { className: stage });
    part.style.flexGrow = timings[stage] / total;
    return part;
  }));
  $("stages").setAttribute("aria-label", `Time of each stage; ${milliseconds(total)} in all`);
  const items = stages.map((stage) => [element("i", { className: stage }), `${stage} `, element("b", { textContent: milliseconds(timings[stage]) })]);
  if (total) items.push(["total ", element("b", { textContent: milliseconds(total) })]);
  $("legend").replaceChildren(...items.map((parts) => element("li", {}, ...parts)));
}

function factsOf({ card, body, files, seed, size, forwards, isVideo }) {
  const call = callOf(files, card);
  const defaults = { ...card.defaults, ...call.defaults };
  const value = (id) => body[id] ?? defaults[id];
  const facts = [size.replace("x", " × "), `${value("num_inference_steps")} steps`];
  if (body.model) facts.unshift(body.model);
  if (isVideo && (body.num_frames || !call.takes_video)) facts.push(`${value("num_frames")} frames`);
  if (body.prompt_weighting === false) facts.push("prompt without weights");
  if (body.scheduler) facts.push(body.scheduler.replace(/Scheduler$/, ""));
  for (const { name, scale } of body.lora ?? []) facts.push(`${name} ${scale}`);
  const guides = defaults.true_cfg_scale !== null && value("true_cfg_scale") > 1;
  if (guides) facts.push(`true CFG ${value("true_cfg_scale")}`);
  if (defaults.guidance_scale !== null && (!guides || body.guidance_scale !== undefined)) facts.push(`guidance ${value("guidance_scale")}`);
  if (forwards && forwards.computed < forwards.asked) facts.push(`${forwards.computed} of ${forwards.asked} forwards computed`);
  if (body.negative_prompt) facts.push(`without “${body.negative_prompt}”`);
  const names = Object.values(files).flat().map((file) => file.name);
  if (names.length) facts.push(`from ${names.join(", ")}`);
  return seed === null ? facts : [...facts, `seed ${seed}`];
}

const milliseconds = (ms) => (ms < 10 ? `${ms.toFixed(1)} ms` : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

/** Returns the body that reproduces exactly this image. */
export function exactly({ body, seed }) {
  const { n, ...one } = body;
  if (seed === null) return one;
  return { ...one, seed: typeof body.seed === "string" ? String(seed) : Number(seed) };
}
