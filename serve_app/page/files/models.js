/** The cards of the served models, and which of them is chosen. */

import { Refusal, ask } from "./server.js";

export let cards = [];     // of models; one of an adapter has a parent, and is none of them
export let card = null;    // of the chosen model

/** Chooses the same model again; at first the one that the address names (`#name`), or the first. */
export async function loadModels() {
  const { data } = await (await ask("v1/models")).json();
  cards = data.filter((one) => !one.parent);
  if (!cards.length) throw new Refusal({ message: "This server has no models." });
  chooseModel(card?.id ?? nameInAddress());
}

function nameInAddress() {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
}

/** Says so in the address, where there is a choice. */
export function chooseModel(id) {
  card = cards.find((one) => one.id === id) ?? cards[0];
  const address = cards.length > 1 ? `#${encodeURIComponent(card.id)}` : location.pathname;
  history.replaceState(null, "", address);
}

/** The kind of call that these files ask for, as the server judges it. */
export function callOf(files, { calls } = card) {
  const [reference] = files.input_reference ?? [];
  let kind = "generate";
  if (reference) kind = reference.type.startsWith("video/") ? "video_to_video" : "image_to_video";
  else if (files.mask) kind = "inpaint";
  else if (files.image) kind = "edit";
  return calls[kind] ?? Object.values(calls)[0];
}

export const pathOf = (files, of = card) => callOf(files, of).path.slice(1);

/** What a request with these files gets where it leaves a field out. */
export const defaultsOf = (files) => ({ ...card.defaults, ...callOf(files).defaults });
