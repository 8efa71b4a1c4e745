/** Shows the API's OpenAPI description as tables. */

import { ask } from "./server.js";

const MAX_VALUES = 12, MAX_PATTERN = 60;
let schemas = {};

function make(tag, text, parent) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

/** Returns the schema that a reference names. */
function resolve(schema) {
  return schema && schema.$ref ? schemas[schema.$ref.split("/").pop()] || {} : schema || {};
}

/** Returns a field's type and limits in one line. */
function told(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf || schema.oneOf) {
    return (schema.anyOf || schema.oneOf).filter((each) => each.type !== "null").map(told).join(" or ");
  }
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) {
    const some = schema.enum.slice(0, MAX_VALUES).map((value) => JSON.stringify(value)).join(", ");
    return schema.enum.length > MAX_VALUES ? some + ", …" : some;
  }
  const limits = [];
  if (schema.minimum !== undefined) limits.push("from " + schema.minimum);
  if (schema.exclusiveMinimum !== undefined) limits.push("above " + schema.exclusiveMinimum);
  if (schema.maximum !== undefined) limits.push("to " + schema.maximum);
  if (schema.exclusiveMaximum !== undefined) limits.push("below " + schema.exclusiveMaximum);
  if (schema.maxLength !== undefined) limits.push("at most " + schema.maxLength + " characters");
  if (schema.pattern && schema.pattern.length <= MAX_PATTERN) limits.push("like " + schema.pattern);
  const of = schema.type === "array" ? "list of " + told(schema.items || {}) : schema.type || "any";
  return limits.length ? of + ", " + limits.join(", ") : of;
}

function table(schema, parent) {
  const fields = Object.entries(resolve(schema).properties || {});
  if (!fields.length) return;
  const needed = resolve(schema).required || [];
  const wrap = make("div", undefined, parent);
  wrap.className = "table";
  const rows = make("tbody", undefined, make("table", undefined, wrap));
  for (const [name, field] of fields) {
    const row = make("tr", undefined, rows);
    make("code", name, make("td", undefined, row));
    make("td", told(field), row);
    const about = [needed.includes(name) && field.default === undefined ? "required" : "", field.description || ""];
    if (field.default !== undefined && field.default !== null) about.push("default: " + JSON.stringify(field.default));
    const cell = make("td", about.filter(Boolean).join("; "), row);
    cell.className = "soft";
  }
}

function show(path, method, operation, parent) {
  const section = make("section", undefined, parent);
  make("h2", method.toUpperCase() + " " + path, section);
  make("p", operation.summary || "", section);
  for (const [kind, { schema }] of Object.entries((operation.requestBody || {}).content || {})) {
    make("h3", "Body: " + kind, section);
    if (kind === Object.keys(operation.requestBody.content)[0]) table(schema, section);
    else make("p", "the same fields", section);
  }
  for (const [status, answer] of Object.entries(operation.responses || {})) {
    make("h3", status + ": " + answer.description, section);
    if (status !== "200") continue;
    for (const [kind, { schema, itemSchema }] of Object.entries(answer.content || {})) {
      const about = make("p", itemSchema ? kind + "; the data of each event is one of" : kind, section);
      about.className = "soft";
      const told = itemSchema ? itemSchema.properties.data.contentSchema : schema;
      for (const part of resolve(told).anyOf || [told]) table(part, section);
    }
  }
}

async function main() {
  const api = await (await ask("openapi.json")).json();
  schemas = (api.components || {}).schemas || {};
  document.getElementById("title").textContent = api.info.title + ": API";
  document.getElementById("overview").textContent = api.info.description;
  for (const [path, operations] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(operations)) show(path, method, operation, document.getElementById("paths"));
  }
}

main().catch((error) => { document.getElementById("overview").textContent = "openapi.json could not be read: " + error; });
