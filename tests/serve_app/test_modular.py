"""Tests of a pipeline that exists in diffusers only as blocks: two shards draw what the whole pipeline draws."""

import base64
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from ray import serve

from deployments.checkpoints.source import fetch_checkpoint
from serve_app.app import build_app
from serve_app.config.serve_file import parse_app_config
from tests.deployments import plain
from tests.serve_app.pictures import SIDE, data_url, file, noise

pytestmark = pytest.mark.slow
NAME = "flux3"
STEPS = {"num_inference_steps": 4}
SIZE = {"size": f"{SIDE}x{SIDE}"}


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    if not request.config.getoption("--thorough"):
        pytest.skip("an app of its own: --thorough")
    resources = {"num_cpus": 0.1}
    config = parse_app_config(
        {
            "model": {"name": NAME, "checkpoint": f"tiny://{NAME}"},
            "encoder": resources,
            "transformer": resources | {"shards": 2},
            "vae": resources,
            "ingress": {"num_replicas": 1},
        }
    )
    url = request.getfixturevalue("serve_url")
    serve.run(build_app(config), name=NAME, route_prefix=f"/{NAME}")
    with httpx.Client(base_url=f"{url}/{NAME}", timeout=120) as client:
        yield client
    serve.delete(NAME)


@pytest.fixture(scope="module")
def draw() -> Callable[..., np.ndarray]:
    """Returns `draw(prompt, seed, **arguments)`, which draws with the plain pipeline."""
    pipeline = cache(lambda: plain.load_plain(fetch_checkpoint(f"tiny://{NAME}", ())))

    def draw(prompt: str, seed: int, *, guidance_scale: float = 3.5, **arguments: Any) -> np.ndarray:
        pipeline().guider.guidance_scale = guidance_scale
        generator = torch.Generator().manual_seed(seed)
        asked = {"prompt": prompt, "height": SIDE, "width": SIDE, "generator": generator, **STEPS}
        [image], _ = plain.draw(pipeline(), **asked | arguments)
        return np.asarray(image).astype(int)

    return draw


def ask(client: httpx.Client, path: str = "/v1/images/generations", **fields: Any) -> np.ndarray:
    answer = client.post(path, json=fields | STEPS | SIZE | {"response_format": "b64_json"})
    assert answer.status_code == 200, answer.text
    [data] = answer.json()["data"]
    image = Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("fields", [{}, {"negative_prompt": "blurry"}, {"guidance_scale": 1.0}])
def test_a_picture_is_the_plain_pipelines(
    client: httpx.Client, draw: Callable[..., np.ndarray], fields: dict[str, Any]
) -> None:
    np.testing.assert_array_equal(
        ask(client, prompt="a red cat", seed=5, **fields), draw("a red cat", 5, **fields)
    )


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("num_images", [1, 2])
def test_an_edit_is_the_plain_pipelines(
    client: httpx.Client, draw: Callable[..., np.ndarray], num_images: int
) -> None:
    images = [noise(seed) for seed in range(num_images)]
    sent = {"image": [data_url(file(image)) for image in images]}
    edited = ask(client, "/v1/images/edits", prompt="a hat", seed=3, **sent)
    np.testing.assert_array_equal(edited, draw("a hat", 3, image=images))


@pytest.mark.usefixtures("ray_cluster")
def test_eight_at_once_get_each_their_own(client: httpx.Client, draw: Callable[..., np.ndarray]) -> None:
    """The requests share forwards, and a batch rounds differently: one grey level of 255 is allowed."""
    prompts = [f"{number} dogs" for number in range(8)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        drawn = list(pool.map(lambda prompt: ask(client, prompt=prompt, seed=9), prompts))
    for prompt, picture in zip(prompts, drawn, strict=True):
        assert np.abs(picture - draw(prompt, 9)).max() <= 1
