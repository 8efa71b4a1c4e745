"""The programs in examples/ run unchanged against running apps: they write what the server draws."""

import base64
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from PIL import Image
from ray import serve

from serve_app.config.serve_file import APP_NAME

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPT = {".py": sys.executable, ".mjs": "node"}
CIRCLE = {"prompt": "a red circle", "seed": 7}


@pytest.fixture
def example(tmp_path: Path) -> Callable[..., str]:
    """`example(app, name, *args)`: runs the example in an empty folder and returns its output."""

    def run(app: Any, name: str, *args: str, **environment: str) -> str:
        command = [SCRIPT[Path(name).suffix], str(EXAMPLES / name), *args]
        env = os.environ | {"RELAY_URL": app.url, "RELAY_API_KEY": "none"} | environment
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def drawn(app: Any, path: str = "generations", **request: Any) -> bytes:
    [data] = app.client.post(f"/v1/images/{path}", **request).json()["data"]
    return base64.b64decode(data["b64_json"])


def test_every_example_is_run_here() -> None:
    programs = {path.name for path in EXAMPLES.iterdir() if path.suffix in SCRIPT}
    text = Path(__file__).read_text()
    assert {name for name in programs if f'"{name}"' not in text} == set()
    told = (EXAMPLES / "README.md").read_text()
    assert {name for name in programs if f"[{name}]({name})" not in told} == set()


@pytest.mark.parametrize("name", ["picture.py", "picture.mjs"])
def test_a_picture(flux_app: Any, example: Callable[..., str], tmp_path: Path, name: str) -> None:
    if name.endswith(".mjs"):
        require_javascript()
    told = example(flux_app, name, "a red circle")
    assert told.startswith("picture.png: 64x64, seed 7, ")
    assert (tmp_path / "picture.png").read_bytes() == drawn(flux_app, json=CIRCLE)


def require_javascript() -> None:
    if shutil.which("node") is None or not (EXAMPLES / "node_modules" / "openai").exists():
        pytest.skip("needs node, and `npm install` in examples")


def test_a_picture_that_is_watched(flux_app: Any, example: Callable[..., str], tmp_path: Path) -> None:
    told = example(flux_app, "stream.py", "a red circle")
    assert "denoise: step 0 of 28" in told
    assert {path.name for path in tmp_path.glob("*.png")} >= {"partial-0.png", "finished.png"}
    assert (tmp_path / "finished.png").read_bytes() == drawn(flux_app, json=CIRCLE | {"num_inference_steps": 28})


def test_half_of_a_picture_drawn_anew(flux_app: Any, example: Callable[..., str], tmp_path: Path) -> None:
    assert example(flux_app, "edit.py") == "after.png: 64x64, seed 7\n"
    sent = {name: (tmp_path / name).read_bytes() for name in ("before.png", "mask.png")}
    assert {Image.open(io.BytesIO(data)).size for data in sent.values()} == {(64, 64)}
    fields = {"prompt": "a blue square on the right, on a white background", "seed": "7", "strength": "1.0"}
    files = {"image": sent["before.png"], "mask": sent["mask.png"]}
    after = (tmp_path / "after.png").read_bytes()
    assert after == drawn(flux_app, "edits", data=fields, files=files) != sent["before.png"]


def test_a_video_in_the_background(wan_app: Any, example: Callable[..., str], tmp_path: Path) -> None:
    told = example(wan_app, "video_job.py", "waves", PYTHONWARNINGS="default")
    assert told.endswith("video.mp4: 64x64, seed 7\n")
    same = {"prompt": "waves", "num_frames": 9, "seed": 7}
    assert (tmp_path / "video.mp4").read_bytes() == wan_app.client.post("/v1/videos/sync", json=same).content


@pytest.fixture
def relay_app(start_ingress: Callable[..., Any]) -> Iterator[Any]:
    """An app with the name that the example's handle uses."""
    yield start_ingress(APP_NAME)
    serve.delete(APP_NAME)


def test_a_picture_by_a_handle(relay_app: Any, example: Callable[..., str], tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    told = example(relay_app, "handle.py", "a red circle", RAY_ADDRESS=address)
    assert told.endswith("picture.png: image/png, seed 7\n")
    assert (tmp_path / "picture.png").read_bytes() == drawn(relay_app, json=CIRCLE)
