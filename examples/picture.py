"""Draws an image with OpenAI's Python client: `pip install openai`, then `python picture.py "a red circle"`."""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

url = os.environ.get("RELAY_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("RELAY_API_KEY", "none"))
prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle on the left, on a white background"

model = client.models.list().data[0].id
answer = client.images.generate(
    model=model,
    prompt=prompt,
    extra_body={"seed": 7},  # for fields that OpenAI's API does not have
)
picture = answer.data[0]
Path("picture.png").write_bytes(base64.b64decode(picture.b64_json))
print(f"picture.png: {answer.size}, seed {picture.seed}, {picture.timings_ms['denoise']:.0f} ms of denoising")
