/** Helpers for the document's elements. */

export const $ = (id) => document.getElementById(id);

/** Creates an element. Strings among its children become text, not markup. */
export function element(tag, properties = {}, ...children) {
  const it = Object.assign(document.createElement(tag), properties);
  it.append(...children);
  return it;
}

/** Notifies the form that a field of it, or all of it, has changed. */
export const changed = (at = $("form")) => at.dispatchEvent(new Event("input", { bubbles: true }));

/** Announces a text to screen readers. */
export function announce(text) {
  $("news").textContent = text;
  $("news").className = "unseen";
}

/** Announces a text, and shows it over the page for some seconds. */
export function tell(text) {
  announce(text);
  $("news").className = "toast";
  setTimeout(() => { if ($("news").textContent === text) $("news").className = "unseen"; }, 5000);
}

/** Whether the form is above the result, not beside it. */
export const isNarrow = () => matchMedia("(max-width: 54rem)").matches;
