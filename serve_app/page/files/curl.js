/** Requests as curl commands for a POSIX shell. */

import { key } from "./key.js";
import { card, pathOf } from "./models.js";
import { BASE, inForm, partsOf } from "./server.js";

/** Returns a request as a command. of: the card of its model. */
export function curl(body, files, of = card) {
  const parts = partsOf(files);
  const sent = parts.length
    ? [
        ...Object.entries(body).map(([name, value]) => `--form-string ${quoted(`${name}=${inForm(value)}`)}`),
        ...parts.map(([name, file]) => `-F ${quoted(`${name}=@"${file.name.replace(/[\\"]/g, "\\$&")}"`)}`),
      ]
    : ["-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(body))}`];
  if (key()) sent.unshift('-H "Authorization: Bearer $RELAY_API_KEY"');
  const rest = of.media === "video"
    ? "--output video.mp4"
    : "| jq -r '.data[0].b64_json' | base64 --decode > image.png";
  return [`curl -s ${BASE}${pathOf(files, of)}`, ...sent, rest].join(" \\\n  ");
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** Copies text. Pages over plain HTTP from another machine have no clipboard; selecting the text works there too. */
export async function copyText(node) {
  getSelection().selectAllChildren(node);
  if (navigator.clipboard) await navigator.clipboard.writeText(node.textContent);
  else document.execCommand("copy");
}
