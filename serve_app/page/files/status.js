/** Shows the server's status over the page, because leaving the page would lose its results. */

import { element } from "./elements.js";
import { ask } from "./server.js";

export async function showStatus() {
  const told = await (await ask("v1/status")).json();
  const close = element("button", { type: "button", textContent: "Close" });
  const dialog = element("dialog", {},
    element("h2", { id: "status-title", textContent: "Status" }),
    element("pre", { tabIndex: 0, textContent: JSON.stringify(told, null, 2) }),
    element("div", { className: "actions" }, close),
  );
  dialog.setAttribute("aria-labelledby", "status-title");
  close.onclick = () => dialog.close();
  dialog.onclose = () => dialog.remove();
  document.body.append(dialog);
  dialog.showModal();
}
