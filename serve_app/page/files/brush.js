/** The mask brush: painted parts of an image are redrawn. */

import { $ } from "./elements.js";

const painted = new WeakMap();    // by mask: {picture, strokes}
let strokes = [];                 // {isErasing, width, points}, all in pixels of the image
let stroke = null;                // the stroke under the pointer
let at = null;                    // position of the keyboard's brush: [x, y]

const dialog = $("brush");
const canvas = $("brush-canvas");
const image = $("brush-image");
const ring = $("brush-ring");

/** Whether a mask may fit an image: a mask painted here fits only the image it was painted on. */
export const isPaintedOn = (mask, picture) => (painted.get(mask)?.picture ?? picture) === picture;

/** Returns a mask as large as the image, transparent where painted; null: nothing is painted; undefined: cancelled.
 * Throws the browser's error if it cannot open the image. */
export async function paint(picture, before) {
  const url = URL.createObjectURL(picture);
  try {
    image.src = url;
    await image.decode();
    strokes = [...(painted.get(before)?.strokes ?? [])];
    stroke = null;
    at = [image.naturalWidth / 2, image.naturalHeight / 2];
    dialog.returnValue = "";
    dialog.showModal();
    fit();
    canvas.focus();
    await new Promise((resolve) => { dialog.onclose = resolve; });
    if (dialog.returnValue !== "done") return undefined;
    return strokes.some(({ isErasing }) => !isErasing) ? await maskOf(picture) : null;
  } finally {
    image.removeAttribute("src");
    URL.revokeObjectURL(url);
    canvas.width = canvas.height = 0;
  }
}

async function maskOf(picture) {
  const whole = document.createElement("canvas");
  [whole.width, whole.height] = [image.naturalWidth, image.naturalHeight];
  const context = whole.getContext("2d");
  draw(context, 1);
  context.globalCompositeOperation = "source-out";    // everything except what is painted
  context.fillRect(0, 0, whole.width, whole.height);
  const blob = await new Promise((resolve) => whole.toBlob(resolve, "image/png"));
  if (!blob) throw new Error("it is too large.");
  const mask = new File([blob], "mask.png", { type: "image/png" });
  painted.set(mask, { picture, strokes });
  return mask;
}

/* ---- The canvas ---- */

/** Fits the canvas to the dialog. Its pixels are the screen's, not the image's. */
function fit() {
  if (!dialog.open || !image.naturalWidth) return;
  const room = $("brush-room").getBoundingClientRect();
  const scale = Math.min(room.width / image.naturalWidth, room.height / image.naturalHeight);
  for (const it of [canvas, image]) {
    it.style.width = `${image.naturalWidth * scale}px`;
    it.style.height = `${image.naturalHeight * scale}px`;
  }
  canvas.width = Math.round(image.naturalWidth * scale * devicePixelRatio);
  canvas.height = Math.round(image.naturalHeight * scale * devicePixelRatio);
  redraw();
}

const scaleOfCanvas = () => canvas.width / image.naturalWidth;

function redraw() {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = context.strokeStyle = getComputedStyle(canvas).color;
  draw(context, scaleOfCanvas());
  $("brush-undo").disabled = $("brush-clear").disabled = !strokes.length;
}

function draw(context, scale) {
  for (const { isErasing, width, points } of strokes) {
    context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = width * scale;
    context.beginPath();
    for (const [x, y] of points) context.lineTo(x * scale, y * scale);
    const [x, y] = points.at(-1);
    context.lineTo(x * scale + 0.01, y * scale);    // a single point becomes a dot
    context.stroke();
  }
  context.globalCompositeOperation = "source-over";
}

/** In pixels of the image. */
const brushWidth = () => (Number($("brush-size").value) / 100) * Math.max(image.naturalWidth, image.naturalHeight);

function place(event) {
  const box = canvas.getBoundingClientRect();
  const scale = image.naturalWidth / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

function begin(point) {
  stroke = { isErasing: $("brush-erase").checked, width: brushWidth(), points: [point] };
  strokes.push(stroke);
  redraw();
}

function showRing([x, y]) {
  const scale = canvas.clientWidth / image.naturalWidth;
  ring.hidden = false;
  ring.style.width = ring.style.height = `${brushWidth() * scale}px`;
  ring.style.left = `${canvas.offsetLeft + x * scale}px`;
  ring.style.top = `${canvas.offsetTop + y * scale}px`;
}

/* ---- User input ---- */

new ResizeObserver(fit).observe($("brush-room"));
canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || !event.isPrimary) return;
  canvas.setPointerCapture(event.pointerId);
  begin(place(event));
});
canvas.addEventListener("pointermove", (event) => {
  if (!event.isPrimary) return;
  at = place(event);
  showRing(at);
  if (!stroke) return;
  const moves = event.getCoalescedEvents?.() ?? [];
  stroke.points.push(...(moves.length ? moves : [event]).map(place));
  redraw();
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { stroke = null; });
canvas.addEventListener("pointerleave", () => { ring.hidden = true; });
canvas.addEventListener("blur", () => { ring.hidden = true; });
canvas.addEventListener("keydown", (event) => {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  if (dx || dy) {
    const step = brushWidth() / 3;
    at = [
      Math.min(Math.max(at[0] + dx * step, 0), image.naturalWidth),
      Math.min(Math.max(at[1] + dy * step, 0), image.naturalHeight),
    ];
  } else if (event.key === " ") {
    begin([...at]);
    stroke = null;
  } else return;
  event.preventDefault();
  showRing(at);
});
dialog.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") { event.preventDefault(); undo(); }
});
$("brush-size").addEventListener("input", () => showRing([image.naturalWidth / 2, image.naturalHeight / 2]));
$("brush-undo").onclick = undo;
$("brush-clear").onclick = () => { strokes = []; redraw(); };
$("brush-done").onclick = () => dialog.close("done");
$("brush-cancel").onclick = () => dialog.close("");

function undo() {
  strokes.pop();
  redraw();
}
