"""Shows an image while it forms: `pip install openai`, then `python stream.py "a red circle"`."""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

url = os.environ.get("RELAY_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("RELAY_API_KEY", "none"))
prompt = sys.argv[1] if len(sys.argv) > 1 else "a small yellow square at the top"

events = client.images.generate(
    prompt=prompt,
    stream=True,
    partial_images=2,
    extra_body={"seed": 7, "progress": True, "num_inference_steps": 28},
)
for event in events:
    match event.type:
        case "image_generation.progress":  # not in OpenAI's API
            print(f"{event.phase}: step {event.step} of {event.num_steps}")
        case "image_generation.partial_image":
            name = f"partial-{event.partial_image_index}.png"
            Path(name).write_bytes(base64.b64decode(event.b64_json))
            print(name)
        case "image_generation.completed":
            Path("finished.png").write_bytes(base64.b64decode(event.b64_json))
            print(f"finished.png: seed {event.seed}")
