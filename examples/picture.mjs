// Draws an image with OpenAI's JavaScript client: `npm install` here, then `node picture.mjs "a red circle"`.
import { writeFile } from "node:fs/promises";

import OpenAI from "openai";

const url = process.env.RELAY_URL ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.RELAY_API_KEY ?? "none" });
const prompt = process.argv[2] ?? "a red circle on the left, on a white background";

const [model] = (await client.models.list()).data;
const answer = await client.images.generate({
  model: model.id,
  prompt,
  seed: 7, // not in OpenAI's API, but the client sends it
});
const [picture] = answer.data;
await writeFile("picture.png", Buffer.from(picture.b64_json, "base64"));
console.log(`picture.png: ${answer.size}, seed ${picture.seed}, ${picture.timings_ms.denoise} ms of denoising`);
