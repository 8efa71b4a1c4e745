/** A request for a video: as a job where the server has them, which outlives this page; else one that is waited for.
 * asked: {card, body, files}. */

import { card, pathOf } from "./models.js";
import { duration, setProgress } from "./progress.js";
import { emptyFrame, keep, mediaOf, place, show } from "./result.js";
import { Refusal, ask, send } from "./server.js";

export const LEFT = "the page was left";    // why a signal is aborted: jobs go on then
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

/* ---- Waited for ---- */

async function waitForVideo(asked, signal) {
  const { card: of, body, files } = asked;
  const answering = send(pathOf(files, of), body, files, signal);
  place([emptyFrame("A video comes when all of its frames are done.")]);
  const begun = performance.now();
  const clock = setInterval(() => setProgress(null, "Making the video", duration((performance.now() - begun) / 1000)), 500);
  try {
    const answer = await answering;
    await showVideo(await answer.blob(), { ...asked, ...factsOf(answer.headers) });
  } finally {
    clearInterval(clock);
  }
}

/** How it was drawn. */
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

/** A job that this tab began before it was loaded again: {id, body, model}, or null. */
export function rememberedJob() {
  try { return JSON.parse(sessionStorage.getItem(REMEMBERED)); } catch { return null; }
}

function remember(job) {
  try {
    if (job) sessionStorage.setItem(REMEMBERED, JSON.stringify(job));
    else sessionStorage.removeItem(REMEMBERED);
  } catch { /* then it is lost to this page when it is left */ }
}

export async function resumeJob({ id, body }, signal) {
  await follow({ id, status: "queued" }, { card, body, files: {} }, signal);
}

/** Until it has ended. Cancelled with the signal, unless the page is left. */
async function follow(job, asked, signal) {
  place([emptyFrame("A video comes when all of its frames are done.")]);
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

/** The job, completed. Throws a Refusal where it is not. */
async function end(job, signal) {
  let begun = null;
  for (let now = job; ; now = await patiently(`${JOBS}/${job.id}`, signal, (answer) => answer.json())) {
    if (now.status === "completed") return now;
    if (now.status === "failed" || now.status === "cancelled") {
      throw new Refusal(now.error ?? { message: `The video was ${now.status}.` });
    }
    if (now.progress) begun ??= { at: performance.now(), progress: now.progress };
    tellProgress(now, begun);
    await pause(POLL_MS, signal);
  }
}

/** A job survives its server, so one that is away is waited for. */
async function patiently(path, signal, read) {
  for (;;) {
    try {
      return await read(await ask(path, { signal }));
    } catch (error) {
      const mayComeBack = error instanceof TypeError || error.status >= 500 || error.status === 429;
      if (signal.aborted || !mayComeBack) throw error;
      setProgress(null, "The server does not answer; the job waits for it", "");
    }
    await pause(POLL_MS, signal);
  }
}

function tellProgress(job, begun) {
  if (!job.progress) return setProgress(null, job.status === "queued" ? "Waiting in the queue" : "Beginning", "");
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

/* ---- Shown ---- */

/** Its size is what is in it. */
async function showVideo(blob, facts) {
  const entry = keep(blob, { ...facts, isVideo: true });
  const video = mediaOf(entry);
  await new Promise((resolve) => { video.onloadedmetadata = video.onerror = resolve; });
  entry.size = `${video.videoWidth}x${video.videoHeight}`;
  show(entry);
}
