/** The cards of the served models, and the chosen one. */

import { RequestError, ask } from "./server.js";

export let cards = [];     // of models; cards with a parent are of adapters and left out
export let card = null;    // of the chosen model

/** Loads the cards and keeps the chosen model; initially chooses the one in the address (`#name`), or the first. */
export async function loadModels() {
  const { data } = await (await ask("v1/models")).json();
  cards = data.filter((one) => !one.parent);
  if (!cards.length) throw new RequestError({ message: "This server has no models." });
  chooseModel(card?.id ?? nameInAddress());
}

function nameInAddress() {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
}

/** Chooses a model, and puts its name into the address if there are several. */
export function chooseModel(id) {
  card = cards.find((one) => one.id === id) ?? cards[0];
  const address = cards.length > 1 ? `#${encodeURIComponent(card.id)}` : location.pathname;
  history.replaceState(null, "", address);
}

/** Returns the kind of call that these files ask for, by the server's rules. */
export function callOf(files, { calls } = card) {
  const [reference] = files.input_reference ?? [];
  let kind = "generate";
  if (reference) kind = reference.type.startsWith("video/") ? "video_to_video" : "image_to_video";
  else if (files.mask) kind = "inpaint";
  else if (files.image) kind = "edit";
  return calls[kind] ?? Object.values(calls)[0];
}

export const pathOf = (files, of = card) => callOf(files, of).path.slice(1);

/** Returns the defaults of a request with these files. */
export const defaultsOf = (files) => ({ ...card.defaults, ...callOf(files).defaults });
