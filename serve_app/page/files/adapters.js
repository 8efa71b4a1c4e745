/** Adapters (LoRA): which of the model's adapters are applied, and their scales. */

import { $, element } from "./elements.js";
import { card } from "./models.js";

const MOST = 2;    // maximum of a slider; its number field takes any value
let rows = [];     // {name, scale, mixed, number}

/** Shows the model's adapters. A choice made for another model is kept if this one has an adapter of that name. */
export function offerAdapters() {
  const before = readAdapters();
  const adapters = card.adapters;
  $("adapters").hidden = !adapters.length;
  rows = adapters.map(offerOne);
  $("lora").replaceChildren(...rows.map((row) => row.item));
  fillAdapters(before);
}

function offerOne({ name, about, scale }) {
  const mixed = element("input", { type: "checkbox" });
  const slider = element("input", { type: "range", min: 0, max: Math.max(MOST, scale), step: 0.05, value: scale });
  const number = element("input", { type: "number", step: 0.05, value: scale });
  slider.setAttribute("aria-label", `How much of ${name}`);
  number.setAttribute("aria-label", `How much of ${name}, as a number`);
  slider.oninput = () => { number.value = slider.value; };
  number.oninput = () => { slider.value = number.value; };
  const scales = element("div", { className: "scale", hidden: true }, slider, number);
  mixed.oninput = () => { scales.hidden = !mixed.checked; };
  const text = element("span", {}, element("b", { textContent: name }), element("small", { textContent: about ? ` ${about}` : "" }));
  return { name, scale, mixed, number, slider, scales, item: element("li", {}, element("label", {}, mixed, text), scales) };
}

/** Returns the chosen adapters as a request's `lora`. */
export function readAdapters() {
  return rows.filter(({ mixed }) => mixed.checked).map(({ name, scale, number }) => {
    return { name, scale: number.value === "" ? scale : Number(number.value) };
  });
}

export function fillAdapters(lora) {
  for (const { name, scale, mixed, number, slider, scales } of rows) {
    const chosen = lora.find((one) => one.name === name);
    mixed.checked = Boolean(chosen);
    scales.hidden = !chosen;
    number.value = slider.value = chosen?.scale ?? scale;
  }
  if (lora.length) $("adapters").open = true;
}
