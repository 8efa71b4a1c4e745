/** The fields of a request: their options for the chosen model, their values, and their errors. */

import { fillAdapters, offerAdapters, readAdapters } from "./adapters.js";
import { $, changed, element } from "./elements.js";
import { FILES, fillInputs, offerInputs, readInputs } from "./inputs.js";
import { card, cards, defaultsOf } from "./models.js";

const TEXTS = ["prompt", "negative_prompt", "size", "quality", "scheduler"];
const FLAGS = ["prompt_weighting"];
export const NUMBERS = ["num_inference_steps", "guidance_scale", "true_cfg_scale", "num_frames", "fps", "strength", "control_scale", "n"];
export const FIELDS = [...TEXTS, ...FLAGS, ...NUMBERS, "seed"];
const RATIOS = [[1, 1], [3, 2], [2, 3], [16, 9], [9, 16]];

const hide = (id, isHidden) => { $(id).closest(".field").hidden = isHidden; };

/* ---- Options ---- */

/** Shows the chosen model's fields and options. Entered values stay. */
export function offerFields() {
  const { limits, media, tiers } = card;
  const hasCards = cards.length > 1;
  $("served").textContent = hasCards ? card.family : `${card.id} · ${card.family}`;
  document.title = `${card.id} · Latent Relay`;
  hide("model", !hasCards);
  $("model").replaceChildren(...cards.map((one) => new Option(one.id, one.id, false, one === card)));
  $("num_inference_steps").max = limits.max_num_inference_steps;
  $("n").max = limits.max_n;
  $("num_frames").max = limits.max_num_frames;
  $("num_frames").step = limits.frame_stride;
  hide("n", media === "video");
  hide("prompt_weighting", !card.prompt_weighting);
  hide("quality", !tiers.medium && !tiers.low);
  $("size-note").textContent = limits.sizes.length ? limits.sizes.join(", ") : `multiples of ${limits.size_multiple}`;
  $("frames-note").textContent = `1 + a multiple of ${limits.frame_stride}`;
  offerSchedulers();
  offerInputs();
  offerAdapters();
  offerShapes();
  offerExamples();
  tellDefaults();
}

/** Offers schedulers by diffusers' class names, the model's own first. */
function offerSchedulers() {
  const [own, ...others] = card.schedulers ?? [];
  const chosen = $("scheduler").value;
  hide("scheduler", !others.length);
  if (!others.length) return;
  const short = (name) => name.replace(/Scheduler$/, "");
  $("scheduler").replaceChildren(new Option(`${short(own)} (the model's own)`, ""), ...others.map((name) => new Option(short(name), name)));
  $("scheduler").value = others.includes(chosen) ? chosen : "";
}

/** Offers the model's example prompts, if it has any. */
function offerExamples() {
  const { about, examples } = card;
  $("examples").hidden = !about && !examples.length;
  $("knows").textContent = about;
  $("prompt").placeholder = examples[0] ?? "a red circle on the left, on a white background";
  const buttons = examples.map((prompt) => element("button", {
    type: "button",
    textContent: prompt,
    onclick: () => { $("prompt").value = prompt; forgetError($("prompt")); changed(); $("prompt").focus(); },
  }));
  $("examples").replaceChildren($("knows"), ...buttons);
}

/** Offers sizes of about the default's area in five aspect ratios, or the nearest of a model's fixed sizes. */
function offerShapes() {
  const { size_multiple: multiple, max_pixels, sizes } = card.limits;
  const [width, height] = card.defaults.size.split("x").map(Number);
  const side = Math.sqrt(Math.min(width * height, max_pixels));
  const round = (value) => Math.max(multiple, Math.round(value / multiple) * multiple);
  const buttons = [];
  for (const [w, h] of RATIOS) {
    const far = (size) => Math.abs(Math.log(size.split("x")[0] / size.split("x")[1] / (w / h)));
    const wanted = `${round(side * Math.sqrt(w / h))}x${round(side * Math.sqrt(h / w))}`;
    const size = sizes.length ? sizes.toSorted((one, other) => far(one) - far(other))[0] : wanted;
    const [a, b] = size.split("x").map(Number);
    if (a * b > max_pixels) continue;
    const icon = element("i");
    icon.style.width = `${(16 * w) / Math.max(w, h)}px`;
    icon.style.height = `${(16 * h) / Math.max(w, h)}px`;
    const button = element("button", { type: "button", title: size }, element("span", {}, icon), `${w}:${h}`);
    button.dataset.size = size;
    button.onclick = () => { $("size").value = size; forgetError($("size")); changed(); };
    buttons.push(button);
  }
  $("shapes").replaceChildren(...buttons);
}

/** Shows the defaults of empty fields. */
export function tellDefaults() {
  const files = readInputs();
  const defaults = defaultsOf(files);
  if (Object.keys(files).length) defaults.size = "as the input";
  for (const id of ["size", ...NUMBERS]) {
    if (id === "n") continue;
    hide(id, defaults[id] == null);
    $(id).placeholder = defaults[id];
  }
  const size = $("size").value.trim() || defaults.size;
  for (const button of $("shapes").children) button.setAttribute("aria-pressed", button.dataset.size === size);
  const scale = Number($(card.guidance).value || defaults[card.guidance]);
  $("negative-hint").hidden = $("negative_prompt").value.trim() === "" || scale > 1;
  $("negative-hint").textContent = `This has no effect unless ${labelOf(card.guidance)} is above 1. It is ${scale}.`;
}

const labelOf = (id) => document.querySelector(`label[for="${id}"]`).firstChild.textContent.trim();

/* ---- The request ---- */

/** Returns the body. Empty fields are left out, and validation is left to the server. */
export function readFields() {
  const body = cards.length > 1 ? { model: card.id } : {};
  for (const id of FIELDS) {
    const value = $(id).value.trim();
    if (value === "" || $(id).closest(".field").hidden) continue;
    const number = Number(value);
    const isNumber = !TEXTS.includes(id) && Number.isFinite(number) && (id !== "seed" || Number.isSafeInteger(number));
    body[id] = FLAGS.includes(id) ? value === "true" : isNumber ? number : value;
  }
  body.prompt ??= "";
  const lora = readAdapters();
  if (lora.length) body.lora = lora;
  return body;
}

export function fillFields(body, files) {
  for (const id of FIELDS) $(id).value = body[id] ?? "";
  fillAdapters(body.lora ?? []);
  fillInputs(files);
  $("settings").open = true;
  changed();
}

/* ---- Errors ---- */

/** Shows an error next to its field, which gets the focus, or else above the result. */
export function showError({ message, param }) {
  const field = (param ?? "").split(".")[0];
  const at = ["model", "lora", ...FIELDS, ...FILES].includes(field) ? $(field) : null;
  if (!at || at.closest("[hidden]")) {
    $("alert").textContent = message;
    $("alert").hidden = false;
    return;
  }
  const id = `${field}-wrong`;
  forgetError(at);
  at.after(element("p", { className: "wrong", id, role: "alert", textContent: message }));
  if (at.closest("details")) at.closest("details").open = true;
  const control = controlOf(at);
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", id);
  control.focus();
}

/** Returns the control of a field; the field of adapters contains several. */
const controlOf = (at) => (at.matches("ul") ? at.querySelector("input") : at);

export function forgetError(at) {
  for (const name of ["aria-invalid", "aria-describedby"]) controlOf(at)?.removeAttribute(name);
  $(`${at.id}-wrong`)?.remove();
}

export function forgetErrors() {
  for (const id of ["model", "lora", ...FIELDS, ...FILES]) forgetError($(id));
  $("alert").hidden = true;
}
