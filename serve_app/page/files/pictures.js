/** Requests images by a stream of events. asked: {card, body, files}. */

import { pathOf } from "./models.js";
import { tellSteps } from "./progress.js";
import { complete, describe, emptyFrame, formOf, keep, place, show } from "./result.js";
import { RequestError, readEvents, send } from "./server.js";

export async function makePictures(asked, signal) {
  const { card, body, files } = asked;
  const answer = await send(pathOf(files, card), { ...body, stream: true, partial_images: 3, progress: true }, files, signal);
  const frames = Array.from({ length: body.n ?? 1 }, () => emptyFrame("…"));
  place(frames);
  const news = frames.map(() => ({ step: 0, num_steps: 0, eta_s: null, phase: "denoise" }));
  const entries = [];
  for await (const [event, data] of readEvents(answer)) {
    if (event === "error") throw new RequestError(data.error);
    if (data.type.endsWith(".progress")) {
      news[data.index] = data;
      tellSteps(news);
    } else if (data.type.endsWith(".partial_image")) {
      frames[data.index].replaceChildren(await formOf(data));
    } else if (data.type.endsWith(".completed")) {
      entries[data.index] = keep(blobOf(data), { ...asked, ...factsOf(data) });
      await complete(frames[data.index], entries[data.index]);
    }
  }
  if (Object.keys(entries).length < frames.length) throw new RequestError({ message: "The connection ended before the image was done." });
  if (frames.length === 1) return show(entries[0]);
  place(frames);
  describe(entries[0]);
}

function factsOf({ size, seed, timings_ms: timings, forwards, warnings, output_format: format }) {
  return { size, seed, timings, forwards, warnings, format };
}

function blobOf({ b64_json, output_format }) {
  return new Blob([Uint8Array.from(atob(b64_json), (c) => c.charCodeAt(0))], { type: `image/${output_format}` });
}
