/** Requests to this server, and its answers. */

import { askForKey, key } from "./key.js";

/** The API's base URL; ends with a slash. */
export const BASE = location.origin + location.pathname.replace(/[^/]*$/, "");

/** A refused request: the message, and the field it is about. */
export class RequestError extends Error {
  constructor({ message, param = null }, status = 0, retryAfter = null) {
    super(message + (retryAfter ? ` Try again in ${retryAfter} s.` : ""));
    this.param = param;
    this.status = status;
  }
}

/** Returns a successful answer. Throws a RequestError, or a TypeError if there is no connection. */
export async function ask(path, options = {}) {
  for (;;) {
    const headers = new Headers(options.headers);
    if (key()) headers.set("Authorization", `Bearer ${key()}`);
    const answer = await fetch(BASE + path, { ...options, headers });
    if (answer.ok) return answer;
    const refused = await errorOf(answer);
    if (answer.status !== 401) throw refused;
    await askForKey(refused);
  }
}

async function errorOf(answer) {
  const text = await answer.text();
  let error = { message: `The server answered ${answer.status}. ${text.slice(0, 200)}` };
  try { error = JSON.parse(text).error ?? error; } catch { /* not from this server */ }
  return new RequestError(error, answer.status, answer.headers.get("Retry-After"));
}

/** Posts a body as JSON, or as a form if there are files. */
export function send(path, body, files, signal) {
  const parts = partsOf(files);
  if (!parts.length) {
    return ask(path, { method: "POST", signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
  }
  const form = new FormData();
  for (const [name, value] of [...Object.entries(body), ...parts]) form.append(name, inForm(value));
  return ask(path, { method: "POST", signal, body: form });
}

/** Returns a value for a form, in which lists are JSON. */
export const inForm = (value) => (Array.isArray(value) ? JSON.stringify(value) : value);

/** Returns the files of a form as [name, file]. */
export function partsOf(files) {
  return Object.entries(files).flatMap(([id, chosen]) => chosen.map((file) => [chosen.length > 1 ? `${id}[]` : id, file]));
}

/** Yields server-sent events as [event, data]; skips lines that begin with ":", which keep the connection alive. */
export async function* readEvents(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r", "");
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.split("\n").find((line) => line.startsWith(`${name}:`))?.slice(name.length + 1).trim();
      const data = field("data");
      if (data) yield [field("event"), JSON.parse(data)];
    }
  }
}
