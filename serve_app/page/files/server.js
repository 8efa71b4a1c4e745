/** What this server is asked, and what it answers. */

import { askForKey, key } from "./key.js";

/** Where its API is; ends with a slash. */
export const BASE = location.origin + location.pathname.replace(/[^/]*$/, "");

/** What was refused, and of which field. */
export class Refusal extends Error {
  constructor({ message, param = null }, status = 0, retryAfter = null) {
    super(message + (retryAfter ? ` Try again in ${retryAfter} s.` : ""));
    this.param = param;
    this.status = status;
  }
}

/** The answer, if it is a good one. Throws a Refusal; a TypeError if there is no connection. */
export async function ask(path, options = {}) {
  for (;;) {
    const headers = new Headers(options.headers);
    if (key()) headers.set("Authorization", `Bearer ${key()}`);
    const answer = await fetch(BASE + path, { ...options, headers });
    if (answer.ok) return answer;
    const refused = await refusalOf(answer);
    if (answer.status !== 401) throw refused;
    await askForKey(refused);
  }
}

async function refusalOf(answer) {
  const text = await answer.text();
  let error = { message: `The server answered ${answer.status}. ${text.slice(0, 200)}` };
  try { error = JSON.parse(text).error ?? error; } catch { /* not from this server */ }
  return new Refusal(error, answer.status, answer.headers.get("Retry-After"));
}

/** Asks for what a body says, as JSON or, beside files, as a form. */
export function send(path, body, files, signal) {
  const parts = partsOf(files);
  if (!parts.length) {
    return ask(path, { method: "POST", signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
  }
  const form = new FormData();
  for (const [name, value] of [...Object.entries(body), ...parts]) form.append(name, inForm(value));
  return ask(path, { method: "POST", signal, body: form });
}

/** In a form lists are JSON. */
export const inForm = (value) => (Array.isArray(value) ? JSON.stringify(value) : value);

/** Files of a form, by name. */
export function partsOf(files) {
  return Object.entries(files).flatMap(([id, chosen]) => chosen.map((file) => [chosen.length > 1 ? `${id}[]` : id, file]));
}

/** Server-sent events as [event, data]; lines that begin with ":" keep the connection alive. */
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
