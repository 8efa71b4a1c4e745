"""Draws an image without HTTP, from Python on a node of the Ray cluster: `python handle.py "a red circle"`.

Run it with the Python in which `relay` is installed; it uses the app that `relay serve` started.
"""

import sys
from pathlib import Path

import ray
from ray import serve

from serve_app.errors import BadRequest

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle on the left, on a white background"

ray.init(address="auto", log_to_driver=False)  # uses the token that Ray wrote to ~/.ray/auth_token
handle = serve.get_app_handle("relay")
try:
    [picture] = handle.generate.remote(prompt=prompt, seed=7).result()
except BadRequest as refused:
    sys.exit(f"{refused.param}: {refused.message}")
Path("picture.png").write_bytes(picture.media.data)
print(f"picture.png: {picture.media.media_type}, seed {picture.seed}")
