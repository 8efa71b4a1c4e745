/** Requests a video: as a job, which survives leaving the page, if the server has jobs; else by waiting for the answer.
 * asked: {card, body, files}. */

import { card, pathOf } from "./models.js";
import { duration, setProgress } from "./progress.js";
import { emptyFrame, keep, mediaOf, place, show } from "./result.js";
import { RequestError, ask, send } from "./server.js";

export const LEFT = "the page was left";    // reason of an abort after which jobs continue
const JOBS = "v1/videos";
const REMEMBERED = "latent-relay-job";
const POLL_MS = 1000;
let hasJobs = null;

export async function makeVideo(asked, signal) {
  await (await servesJobs(signal) ? beginJob : waitForVideo)(asked, signal);
}

async function servesJobs(signal) {
  hasJobs ??= Boolean((await (await ask("openapi.json", { signal })).json()).paths[`/${JOBS}`]?.post);
  return hasJobs;
}

/* ---- Without jobs ---- */

async function waitForVideo(asked, signal) {
  const { card: of, body, files } = asked;
  const answering = send(pathOf(files, of), body, files, signal);
  place([emptyFrame("The video appears when all its frames are done.")]);
  const begun = performance.now();
  const clock = setInterval(() => setProgress(null, "Making the video", duration((performance.now() - begun) / 1000)), 500);
  try {
    const answer = await answering;
    await showVideo(await answer.blob(), { ...asked, ...factsOf(answer.headers) });
  } finally {
    clearInterval(clock);
  }
}

/** Returns how the video was generated. */
function factsOf(headers) {
  const timed = headers.get("Server-Timing").split(", ").map((one) => one.split(";dur="));
  const [computed, asked] = headers.get("X-Forwards").split("/").map(Number);
  return {
    seed: headers.get("X-Seed"),
    timings: Object.fromEntries(timed.map(([stage, ms]) => [stage, Number(ms)])),
    forwards: { computed, asked },
    warnings: JSON.parse(headers.get("X-Warnings") ?? "[]"),
    format: "mp4",
  };
}

/* ---- Jobs ---- */

async function beginJob(asked, signal) {
  const { card: of, body, files } = asked;
  const job = await (await send(JOBS, body, files, signal)).json();
  remember({ id: job.id, body, model: of.id });
  await follow(job, asked, signal);
}

/** Returns the job that this tab started before it was reloaded: {id, body, model}, or null. */
export function rememberedJob() {
  try { return JSON.parse(sessionStorage.getItem(REMEMBERED)); } catch { return null; }
}

function remember(job) {
  try {
    if (job) sessionStorage.setItem(REMEMBERED, JSON.stringify(job));
    else sessionStorage.removeItem(REMEMBERED);
  } catch { /* then the job cannot be resumed after leaving the page */ }
}

export async function resumeJob({ id, body }, signal) {
  await follow({ id, status: "queued" }, { card, body, files: {} }, signal);
}

/** Follows a job until it has ended. Aborting the signal cancels the job, unless the page is left. */
async function follow(job, asked, signal) {
  place([emptyFrame("The video appears when all its frames are done.")]);
  try {
    const done = await end(job, signal);
    const blob = await patiently(`${JOBS}/${done.id}/content`, signal, (answer) => answer.blob());
    const { timings_ms: timings = {}, forwards = null, warnings = [] } = done.drawn ?? {};
    await showVideo(blob, { ...asked, seed: done.seed ?? null, timings, forwards, warnings, format: "mp4" });
    remember(null);
  } catch (error) {
    if (signal.reason === LEFT) throw error;
    remember(null);
    if (signal.aborted) await ask(`${JOBS}/${job.id}`, { method: "DELETE" }).catch(() => {});
    throw error;
  }
}

/** Returns the completed job. Throws a RequestError if it has failed or was cancelled. */
async function end(job, signal) {
  let begun = null;
  for (let now = job; ; now = await patiently(`${JOBS}/${job.id}`, signal, (answer) => answer.json())) {
    if (now.status === "completed") return now;
    if (now.status === "failed" || now.status === "cancelled") {
      throw new RequestError(now.error ?? { message: `The video was ${now.status}.` });
    }
    if (now.progress) begun ??= { at: performance.now(), progress: now.progress };
    tellProgress(now, begun);
    await pause(POLL_MS, signal);
  }
}

/** Retries while the server is unavailable: a job survives its server. */
async function patiently(path, signal, read) {
  for (;;) {
    try {
      return await read(await ask(path, { signal }));
    } catch (error) {
      const mayComeBack = error instanceof TypeError || error.status >= 500 || error.status === 429;
      if (signal.aborted || !mayComeBack) throw error;
      setProgress(null, "The server does not answer; the job waits until it does", "");
    }
    await pause(POLL_MS, signal);
  }
}

function tellProgress(job, begun) {
  if (!job.progress) return setProgress(null, job.status === "queued" ? "Waiting in the queue" : "Starting", "");
  const seconds = (performance.now() - begun.at) / 1000;
  const made = job.progress - begun.progress;
  const left = made > 0 ? `about ${duration((seconds / made) * (100 - job.progress))} left` : "";
  setProgress(job.progress / 100, `${Math.round(job.progress)} %`, left);
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => { clearTimeout(timer); reject(signal.reason); };
    const timer = setTimeout(() => { signal.removeEventListener("abort", stop); resolve(); }, ms);
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
  });
}

/* ---- Display ---- */

/** Shows a video; its size is read from the file. */
async function showVideo(blob, facts) {
  const entry = keep(blob, { ...facts, isVideo: true });
  const video = mediaOf(entry);
  await new Promise((resolve) => { video.onloadedmetadata = video.onerror = resolve; });
  entry.size = `${video.videoWidth}x${video.videoHeight}`;
  show(entry);
}
