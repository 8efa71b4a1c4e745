"""Redraws half of an image: `pip install openai pillow`, then `python edit.py IMAGE.png "a blue square"`.

Without IMAGE.png, it first draws an image.
"""

import base64
import io
import os
import sys
from pathlib import Path

from openai import OpenAI
from PIL import Image

url = os.environ.get("RELAY_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("RELAY_API_KEY", "none"))


def draw() -> bytes:
    prompt = "a red circle on the left, on a white background"
    answer = client.images.generate(prompt=prompt, extra_body={"seed": 7})
    return base64.b64decode(answer.data[0].b64_json)


def right_half(size: tuple[int, int]) -> bytes:
    """Returns a mask, whose white part is redrawn."""
    mask, file = Image.new("L", size), io.BytesIO()
    mask.paste(255, (size[0] // 2, 0, *size))
    mask.save(file, "PNG")
    return file.getvalue()


before = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else draw()
mask = right_half(Image.open(io.BytesIO(before)).size)
prompt = sys.argv[2] if len(sys.argv) > 2 else "a blue square on the right, on a white background"
Path("before.png").write_bytes(before)
Path("mask.png").write_bytes(mask)
answer = client.images.edit(
    image=("before.png", before),
    mask=("mask.png", mask),
    prompt=prompt,
    extra_body={"seed": 7, "strength": 1.0},  # 1 ignores the old content of the masked part; less keeps some of it
)
Path("after.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
print(f"after.png: {answer.size}, seed {answer.data[0].seed}")
