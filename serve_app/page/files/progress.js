/** The progress bar below the image. */

import { $, isNarrow } from "./elements.js";

export function setRunning(isRunning) {
  $("go").hidden = isRunning;
  $("cancel").hidden = !isRunning;
  $("progress").hidden = !isRunning;
  $("result").setAttribute("aria-busy", isRunning);
  if (!isRunning) return;
  setProgress(null, "Waiting for the server", "");
  if (isNarrow()) $("result").scrollIntoView({ block: "start" });
}

/** share: the part of the work that is done, or null if unknown. */
export function setProgress(share, step, left) {
  const bar = $("progress").firstElementChild;
  bar.classList.toggle("unknown", share === null);
  bar.firstElementChild.style.width = share === null ? "" : `${100 * share}%`;
  if (share === null) bar.removeAttribute("aria-valuenow");
  else bar.setAttribute("aria-valuenow", Math.round(100 * share));
  bar.setAttribute("aria-valuetext", step);
  $("step").textContent = step;
  $("left").textContent = left;
}

/** Shows the progress of several images, by the latest event of each. */
export function tellSteps(news) {
  const numSteps = Math.max(...news.map((one) => one.num_steps));
  const share = news.reduce((sum, one) => sum + (one.num_steps ? one.step / one.num_steps : 0), 0) / news.length;
  const step = Math.min(...news.map((one) => one.step));
  const etas = news.map((one) => one.eta_s).filter((eta) => eta !== null);
  const isDecoding = news.every((one) => one.phase === "decode");
  const left = etas.length && !isDecoding ? `about ${duration(Math.max(...etas))} left` : "";
  setProgress(share, isDecoding ? `Decoding after ${numSteps} steps` : `Step ${step} of ${numSteps}`, left);
}

export const duration = (s) => (s < 9.5 ? `${s.toFixed(1)} s` : s < 90 ? `${Math.round(s)} s` : `${Math.round(s / 60)} min`);
