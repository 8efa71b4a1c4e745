/** The document's elements. */

export const $ = (id) => document.getElementById(id);

/** A new one. Texts among its children stay texts. */
export function element(tag, properties = {}, ...children) {
  const it = Object.assign(document.createElement(tag), properties);
  it.append(...children);
  return it;
}

/** Tells the form that something in it, or all of it, now says something else. */
export const changed = (at = $("form")) => at.dispatchEvent(new Event("input", { bubbles: true }));

/** What a screen reader says meanwhile. */
export function announce(text) {
  $("news").textContent = text;
  $("news").className = "unseen";
}

/** The same, over the page for some seconds. */
export function tell(text) {
  announce(text);
  $("news").className = "toast";
  setTimeout(() => { if ($("news").textContent === text) $("news").className = "unseen"; }, 5000);
}

/** Whether the form stands above the result, not beside it. */
export const isNarrow = () => matchMedia("(max-width: 54rem)").matches;
