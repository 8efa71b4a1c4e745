/** Input files of a request: chosen, dropped or pasted, and shown. */

import { isPaintedOn, paint } from "./brush.js";
import { $, announce, changed, element, tell } from "./elements.js";
import { card } from "./models.js";

export const FILES = ["image", "mask", "control_image", "input_reference"];
const PICTURES = "image/png,image/jpeg,image/webp";
const REFERENCES = {
  image_to_video: { accept: PICTURES, note: "an image that the video begins with" },
  video_to_video: { accept: "video/mp4,video/webm", note: "a video that is redrawn" },
};
const chosen = Object.fromEntries(FILES.map((id) => [id, []]));
const urls = new Map();    // of the files that are shown
let offered = {};          // whether each field is offered

/** Offers fields for the model's inputs, and opens them if the model needs more than text. */
export function offerInputs() {
  const { calls, media } = card;
  const all = Object.values(calls);
  const maxImages = Math.max(...all.map((call) => call.max_images));
  const references = Object.keys(REFERENCES).filter((kind) => kind in calls);
  offered = {
    image: media === "image" && maxImages > 0,
    mask: "inpaint" in calls,
    control_image: all.some((call) => call.needs_control),
    input_reference: references.length > 0,
  };
  $("image").multiple = maxImages > 1;
  $("input_reference").accept = references.map((kind) => REFERENCES[kind].accept).join();
  $("reference-note").textContent = references.map((kind) => REFERENCES[kind].note).join(", or ");
  $("files").hidden = !Object.values(offered).includes(true);
  if (offered.control_image || !("generate" in calls)) $("files").open = true;
  showInputs();
}

/** Returns the chosen files that the model takes, by field. */
export function readInputs() {
  return Object.fromEntries(FILES.filter((id) => chosen[id].length && isWanted(id)).map((id) => [id, [...chosen[id]]]));
}

/** Whether the field is usable: a mask needs an image. */
const isWanted = (id) => offered[id] && (id !== "mask" || chosen.image.length > 0);

export function fillInputs(files) {
  for (const id of FILES) chosen[id] = [...(files[id] ?? [])];
  showInputs();
}

/** Returns the field for a dropped or pasted file: the first with room, if any. */
export function placeFor(type) {
  const kind = type.split("/")[0];
  const fits = ["control_image", "image", "input_reference"].filter((id) => offered[id] && $(id).accept.includes(kind));
  return fits.find((id) => !chosen[id].length || $(id).multiple) ?? fits[0];
}

/** Adds files to a field; a field for a single file takes the last of them. */
export function take(files, id = placeFor(files[0]?.type ?? "")) {
  const usable = files.filter((file) => /^(image|video)\//.test(file.type));
  if (!id || !usable.length) {
    tell(id ? "This is not an image." : "This model takes no such file.");
    return;
  }
  chosen[id] = $(id).multiple ? [...chosen[id], ...usable] : usable.slice(-1);
  $("files").open = true;
  announce(`${usable.map((file) => file.name).join(", ")} added.`);
  showInputs();
  changed($(id));
}

function drop(id, file) {
  chosen[id] = chosen[id].filter((one) => one !== file);
  showInputs();
  changed($(id));
  $(id).focus();
}

/* ---- Display ---- */

function showInputs() {
  const [picture] = chosen.image;
  if (chosen.mask.length && !isPaintedOn(chosen.mask[0], picture)) chosen.mask = [];
  for (const id of FILES) {
    $(id).closest(".field").hidden = !isWanted(id);
    const tiles = chosen[id].map((file) => tileOf(id, file));
    $(`${id}-tiles`).replaceChildren(...tiles);
    $(`${id}-tiles`).hidden = !tiles.length;
  }
  $("paint").textContent = chosen.mask.length ? "Continue painting" : "Paint a mask";
  const onView = new Set(FILES.flatMap((id) => chosen[id]));
  for (const [file, url] of urls) {
    if (onView.has(file)) continue;
    URL.revokeObjectURL(url);
    urls.delete(file);
  }
}

function urlOf(file) {
  if (!urls.has(file)) urls.set(file, URL.createObjectURL(file));
  return urls.get(file);
}

/** Returns a file's tile. A mask is shown over its image and dims the parts that stay. */
function tileOf(id, file) {
  const isVideo = file.type.startsWith("video/");
  const media = isVideo
    ? element("video", { src: urlOf(file), muted: true, playsInline: true, preload: "metadata" })
    : element("img", { src: urlOf(file), alt: file.name });
  const size = element("small");
  media.onload = () => { size.textContent = `${media.naturalWidth} × ${media.naturalHeight}`; };
  media.onloadedmetadata = () => { size.textContent = `${media.videoWidth} × ${media.videoHeight}`; };
  const under = id === "mask" && chosen.image.length ? [element("img", { src: urlOf(chosen.image[0]), alt: "" })] : [];
  const remove = element("button", { type: "button", className: "remove", textContent: "×", onclick: () => drop(id, file) });
  remove.setAttribute("aria-label", `Remove ${file.name}`);
  return element("li", { title: file.name, className: id }, ...under, media, size, remove);
}

/* ---- User input ---- */

const filesOf = (transfer) => [...(transfer?.files ?? [])];

for (const id of FILES) {
  $(id).addEventListener("change", () => {
    take([...$(id).files], id);
    $(id).value = "";
  });
}
$("paint").onclick = async () => {
  try {
    const mask = await paint(chosen.image[0], chosen.mask[0]);
    if (mask === undefined) return;
    chosen.mask = mask ? [mask] : [];
    showInputs();
    changed($("mask"));
  } catch (error) {
    tell(`This browser cannot paint on that image: ${error.message}`);
  }
};
document.addEventListener("paste", (event) => {
  const files = filesOf(event.clipboardData);
  if (!files.length || event.clipboardData.types.includes("text/plain")) return;
  event.preventDefault();
  take(files);
});
// On the whole page, because the browser would navigate to a file dropped outside a field.
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
  $("files").open = true;
});
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (name === "drop" || !event.relatedTarget) document.body.classList.remove("dropping");
  });
}
document.addEventListener("drop", (event) => {
  const files = filesOf(event.dataTransfer);
  if (!files.length) return;
  event.preventDefault();
  const zone = event.target.closest?.(".zone:not([hidden])");
  take(files, zone ? zone.querySelector("input").id : undefined);
});
