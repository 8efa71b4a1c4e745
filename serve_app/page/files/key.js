/** The API key: requested when the server requires one, and kept in this tab until it is closed. */

import { element } from "./elements.js";

const NAME = "latent-relay-key";
let inMemory = "";     // if the browser does not allow storage
let asking = null;     // the promise of a key, while the dialog is open

export function key() {
  try { return sessionStorage.getItem(NAME) ?? ""; } catch { return inMemory; }
}

function keep(text) {
  inMemory = text;
  try {
    if (text) sessionStorage.setItem(NAME, text);
    else sessionStorage.removeItem(NAME);
  } catch { /* it stays in memory */ }
  document.dispatchEvent(new Event("key"));
}

/** Resolves when there is a key. Rejects with `error` if the user gives none. */
export function askForKey(error) {
  asking ??= new Promise((resolve, reject) => open(error.message, resolve, () => reject(error)));
  return asking.finally(() => { asking = null; });
}

/** Opens the dialog to change the key. */
export const changeKey = () => open("", () => {}, () => {});

function open(message, onKey, onNone) {
  const input = element("input", {
    id: "key", type: "password", required: true, autocomplete: "off", spellcheck: false, pattern: "\\s*[!-~]+\\s*",
    title: "letters, digits and signs, as `relay key create` printed them",
  });
  const wrong = element("p", { id: "key-wrong", className: "wrong", textContent: key() ? message : "" });
  input.setAttribute("aria-describedby", wrong.id);
  const dismiss = element("button", { type: "button", textContent: key() && !message ? "Forget the key" : "Not now" });
  const form = element("form", {},
    element("h2", { id: "key-title", textContent: "This server requires an API key" }),
    element("label", { htmlFor: input.id, textContent: "Key" }), input, wrong,
    element("p", { className: "hint", textContent: "It is kept in this tab only, and sent only to this server." }),
    element("div", { className: "actions" }, element("button", { className: "primary", textContent: "Use this key" }), dismiss),
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
