"""Tests of an app with two models that share encoder and VAE; only one of their transformers has room at a time.

Room means CPUs here, of which the cluster has 16: Ray places replicas by all resources alike.
"""

import base64
import io
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray import serve

from serve_app.app import build_app
from serve_app.config.checkpoint_files import resolve_family
from serve_app.config.serve_file import parse_app_config
from tests.app import PATIENCE_S, App
from tests.conftest import TEXT_TOKENS

pytestmark = pytest.mark.slow

DRAWS, EDITS = "tiny-flux", "tiny-flux-kontext"
STEPS = {DRAWS: 4, EDITS: 2}
"""Different for each model, so that they draw differently: their tiny denoisers have the same weights."""
COLD_MS = 500.0
"""Less than any new process takes to start."""
NUM_ASKED: Counter[str] = Counter()
"""Number of requests sent, by model."""


def entry(name: str, **stages: Any) -> dict[str, Any]:
    return {
        "model": {
            "name": name,
            "checkpoint": f"tiny://{name.removeprefix('tiny-')}",
            "defaults": {"width": 64, "height": 64, "num_inference_steps": STEPS[name]},
        },
        "transformer": {
            "num_cpus": 9,
            "torch_threads": 1,
            "min_replicas": 0,
            "downscale_delay_s": 3600,
        },
        **stages,
    }


@pytest.fixture(scope="module")
def app(serve_url: str) -> Iterator[App]:
    few = {"num_cpus": 0.1}
    config = resolve_family(
        parse_app_config(
            {
                "models": [
                    entry(DRAWS, encoder=few | {"max_sequence_length": TEXT_TOKENS}, vae=few),
                    entry(EDITS, encoder={"shared_with": DRAWS}, vae={"shared_with": DRAWS}),
                ],
                "ingress": {"num_replicas": 1},
            }
        )
    )
    handle = serve.run(build_app(config), name="several", route_prefix="/several")
    app = App(serve_url, "several", handle, config.served[0].model)
    yield app
    app.client.close()
    serve.delete("several")


def ask(app: App, model: str) -> tuple[np.ndarray, float]:
    """Returns the image, and the time in ms for which the request waited for its model to wake."""
    body = {"model": model, "prompt": "a red fox", "seed": 7}
    answer = app.client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    NUM_ASKED[model] += 1
    [made] = answer.json()["data"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["b64_json"]))))
    return pixels.astype(int), made["timings_ms"]["wake"]


def stage_pids(app: App, stage: str) -> set[int]:
    models = app.status()["models"]
    return {replica["pid"] for of in models.values() for replica in of[stage]["replicas"]}


@pytest.fixture(scope="module")
def expected(plain_pipeline: Callable[[str], Any]) -> dict[str, np.ndarray]:
    """What plain diffusers draws with each model, by name."""
    drawn = {}
    for name, more in ((DRAWS, {}), (EDITS, {"max_area": 64 * 64})):
        output = plain_pipeline(name.removeprefix("tiny-"))(
            prompt="a red fox",
            width=64,
            height=64,
            num_inference_steps=STEPS[name],
            max_sequence_length=TEXT_TOKENS,
            generator=torch.Generator("cpu").manual_seed(7),
            **more,
        )
        drawn[name] = np.asarray(output.images[0]).astype(int)
    return drawn


@pytest.mark.thorough
def test_models_that_take_turns_in_the_room_draw_what_each_draws_alone(
    app: App, expected: dict[str, np.ndarray]
) -> None:
    assert np.abs(expected[DRAWS] - expected[EDITS]).max() > 1
    waited = []
    for name in (DRAWS, EDITS, EDITS, DRAWS):
        pixels, wake_ms = ask(app, name)
        assert np.abs(pixels - expected[name]).max() <= 1
        waited.append(wake_ms > COLD_MS)
    assert waited == [False, True, False, True]


def num_counted(model: str) -> float:
    """Returns the number of requests for this model that an ingress has accepted, as Prometheus sees it."""
    text = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}").text
    found = re.findall(r"^ray_relay_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE)
    counts = {tags: float(value) for tags, value in found}
    return sum(n for tags, n in counts.items() if f'model="{model}"' in tags and 'stage="ingress"' in tags)


def test_each_model_counts_for_itself_in_their_ingress(app: App) -> None:
    ask(app, DRAWS)
    deadline = time.monotonic() + PATIENCE_S
    while num_counted(EDITS) != NUM_ASKED[EDITS] or num_counted(DRAWS) < NUM_ASKED[DRAWS]:
        assert time.monotonic() < deadline, (num_counted(EDITS), num_counted(DRAWS), NUM_ASKED)
        time.sleep(1)


def test_what_is_shared_is_held_once(app: App) -> None:
    assert (len(stage_pids(app, "encoder")), len(stage_pids(app, "vae"))) == (1, 1)
    encoders = [of["encoder"]["replicas"][0] for of in app.status()["models"].values()]
    held = [sum(encoder["memory"]["weights_bytes"].values()) for encoder in encoders]
    alone = sum(app.deployment(f"Encoder_{DRAWS}").stats.remote().result().memory.weights_bytes.values())
    assert held == [alone, alone]


def test_who_sleeps_is_told_and_can_serve(app: App) -> None:
    answer = app.client.get("/health")
    assert answer.status_code == 200
    states = {name: of["stages"]["transformer"] for name, of in answer.json()["models"].items()}
    assert states == {DRAWS: "ok", EDITS: "asleep"}


def test_a_python_handle_names_its_model(app: App, expected: dict[str, np.ndarray]) -> None:
    [picture] = app.handle.generate.remote(model=DRAWS, prompt="a red fox", seed=7).result()
    pixels = np.asarray(Image.open(io.BytesIO(picture.media.data))).astype(int)
    assert np.abs(pixels - expected[DRAWS]).max() <= 1
    assert picture.request.model == DRAWS
