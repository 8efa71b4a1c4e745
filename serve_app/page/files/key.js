/** The API key: asked for when the server wants one, kept in this tab until it is closed. */

import { element } from "./elements.js";

const NAME = "latent-relay-key";
let inMemory = "";     // where the browser lets a page store nothing
let asking = null;     // the promise of a key, while the dialog is open

export function key() {
  try { return sessionStorage.getItem(NAME) ?? ""; } catch { return inMemory; }
}

function keep(text) {
  inMemory = text;
  try {
    if (text) sessionStorage.setItem(NAME, text);
    else sessionStorage.removeItem(NAME);
  } catch { /* in memory, then */ }
  document.dispatchEvent(new Event("key"));
}

/** Until there is a key. Rejects with `refusal` where nobody gives one. */
export function askForKey(refusal) {
  asking ??= new Promise((resolve, reject) => open(refusal.message, resolve, () => reject(refusal)));
  return asking.finally(() => { asking = null; });
}

/** For whoever wants to change it. */
export const changeKey = () => open("", () => {}, () => {});

function open(message, onKey, onNone) {
  const input = element("input", {
    id: "key", type: "password", required: true, autocomplete: "off", spellcheck: false, pattern: "\\s*[!-~]+\\s*",
    title: "letters, digits and signs, as `relay key create` printed them",
  });
  const wrong = element("p", { id: "key-wrong", className: "wrong", textContent: key() ? message : "" });
  input.setAttribute("aria-describedby", wrong.id);
  const dismiss = element("button", { type: "button", textContent: key() && !message ? "Forget it" : "Not now" });
  const form = element("form", {},
    element("h2", { id: "key-title", textContent: "This server wants an API key" }),
    element("label", { htmlFor: input.id, textContent: "Key" }), input, wrong,
    element("p", { className: "hint", textContent: "It stays in this tab, and goes to this server alone." }),
    element("div", { className: "actions" }, element("button", { className: "primary", textContent: "Use it" }), dismiss),
  );
  const dialog = element("dialog", { id: "key-dialog", className: "small" }, form);
  dialog.setAttribute("aria-labelledby", "key-title");
  let given = "";
  form.onsubmit = (event) => { event.preventDefault(); given = input.value.trim(); dialog.close(); };
  dismiss.onclick = () => { if (!message) keep(""); dialog.close(); };
  dialog.onclose = () => {
    dialog.remove();
    if (!given) return onNone();
    keep(given);
    onKey();
  };
  document.body.append(dialog);
  dialog.showModal();
}
