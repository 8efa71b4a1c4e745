"""The quickstart's model as an oracle: a picture that belongs to another request would be seen."""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve

from deployments.checkpoints.shapes.scene import random_scene
from deployments.checkpoints.shapes.wording import describe_unseen
from serve_app.app import build_app
from serve_app.config import load_app_config
from tests.shapes_grader import grade

QUICKSTART = Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml"
NUM_REQUESTS = 48
CONCURRENCY = 16


@pytest.fixture(scope="module")
def quickstart(serve_url: str) -> Iterator[httpx.Client]:
    serve.run(build_app(load_app_config(QUICKSTART)), name="quickstart", route_prefix="/quickstart")
    with httpx.Client(base_url=f"{serve_url}/quickstart", timeout=120) as client:
        yield client
    serve.delete("quickstart")


def draw(client: httpx.Client, prompt: str, seed: int) -> np.ndarray:
    answer = client.post("/v1/images/generations", json={"prompt": prompt, "seed": seed})
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.slow
def test_sixteen_at_once_each_get_what_they_asked_for(quickstart: httpx.Client) -> None:
    """Colour, place and background, every one: two mixed-up requests would show."""
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, is_held_out=True) for _ in range(NUM_REQUESTS)]
    prompts = [describe_unseen(scene, rng) for scene in scenes]
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        pictures = list(pool.map(lambda i: draw(quickstart, prompts[i], seed=i), range(NUM_REQUESTS)))
    grades = [grade(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    wrong = [
        prompt
        for prompt, graded in zip(prompts, grades, strict=True)
        if not (graded.color and graded.place and graded.background)
    ]
    assert wrong == []
