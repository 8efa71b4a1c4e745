"""Tests of an app with several replicas of every stage.

The images of a request are spread over the transformer's replicas, which take turns on one device. A prompt is
encoded by one replica of the encoder. Tiles of a large image are decoded by all replicas of the VAE.
"""

import asyncio
import base64
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ray import serve

from cluster.replicas.serve_options import plan_serve_options
from deployments.answers import DecodeArguments
from deployments.checkpoints.geometry import with_geometry
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.encoder import Encoder
from deployments.request import GenerationRequest, Prompt
from deployments.stages.preload import plan_preload
from deployments.stages.stats import EncoderStats, TransformerStats, VaeStats
from deployments.stages.warm_up import WarmUp
from deployments.transformer import Transformer
from deployments.vae import Vae
from serve_app.config.check import plan_warm_up
from serve_app.config.limits import LimitsConfig
from serve_app.ingress import Ingress
from tests.app import PATIENCE_S, App
from tests.conftest import TEXT_TOKENS

pytestmark = pytest.mark.slow

MODEL = with_geometry(
    ModelConfig.model_validate(
        {
            "name": "tiny-flux",
            "checkpoint": "tiny://flux",
            "family": "flux",
            "defaults": {"width": 64, "height": 64, "num_inference_steps": 4},
            "warm_up": ["64x64"],
        }
    )
)
NUM_WARM_UP_STEPS = 2


TWO: dict[str, Any] = {"num_cpus": 0.1, "min_replicas": 2, "max_replicas": 2}


@pytest.fixture(scope="module")
def app(flux_app: App) -> Iterator[App]:
    warm_up = WarmUp(plan_warm_up(MODEL, LimitsConfig()), TEXT_TOKENS)

    def stage(deployment: type, config: StageConfig) -> Any:
        options = plan_serve_options(
            config,
            graceful_shutdown_timeout_s=5.0,
            has_sessions=config.has_sessions,
            preload=plan_preload(MODEL, config),
        )
        return serve.deployment(deployment).options(**options).bind(MODEL, config, warm_up)

    stages = [
        stage(Encoder, EncoderConfig(**TWO, max_sequence_length=TEXT_TOKENS)),
        stage(Transformer, TransformerConfig(**TWO, time_sharing={"time_slice_s": 0.2})),
        stage(Vae, VaeConfig(**TWO, tiling=64)),
    ]
    ingress = serve.deployment(serve.ingress()(Ingress)).options(ray_actor_options={"num_cpus": 0})
    handle = serve.run(
        ingress.bind(LimitsConfig(), (MODEL, tuple(stages), ())), name="replicas", route_prefix="/replicas"
    )
    served = App(flux_app.url.rpartition("/")[0], "replicas", handle, MODEL)
    yield served
    served.client.close()
    serve.delete("replicas")


def replicas(app: App) -> list[TransformerStats]:
    return both(app, "Transformer", lambda stats: stats.ranks[0].pid)


def both(app: App, deployment: str, pid: Callable[[Any], int]) -> list[Any]:
    """Returns the stats of both replicas. A call may reach either, so it is repeated until both have answered."""
    found: dict[int, Any] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < 2:
        assert time.monotonic() < deadline, f"only {len(found)} replica answered"
        stats = app.deployment(deployment).stats.remote().result()
        found[pid(stats)] = stats
    return list(found.values())


def draw(app: App, prompt: str, **fields: Any) -> np.ndarray:
    body = {"prompt": prompt, "seed": 7, "num_inference_steps": 1} | fields
    answer = app.client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    return pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_n_pictures_are_drawn_by_both_replicas_in_the_order_of_their_seeds(
    app: App, plain: Callable[..., Any]
) -> None:
    assert [stats.queue.num_micro_batches for stats in replicas(app)] == [NUM_WARM_UP_STEPS] * 2
    body = {"prompt": "a red fox", "seed": 40, "n": 10}
    answer = app.client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [picture["seed"] for picture in data] == [*range(40, 50)]
    for picture in data:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["b64_json"])))).astype(int)
        expected = np.asarray(plain("flux", "a red fox", seed=picture["seed"])).astype(int)
        assert np.abs(pixels - expected).max() <= 1
    assert all(stats.queue.num_micro_batches > NUM_WARM_UP_STEPS for stats in replicas(app))


def test_several_prompts_are_answered_in_their_order_as_each_would_be_alone(
    app: App, plain: Callable[..., Any]
) -> None:
    prompts = ["a red fox", "a blue car", "two cats"]
    pictures = app.handle.generate.remote(prompt=prompts, n=2, seed=50).result()
    assert [picture.seed for picture in pictures] == [50, 51] * 3
    for i, picture in enumerate(pictures):
        pixels = np.asarray(Image.open(io.BytesIO(picture.media.data))).astype(int)
        expected = np.asarray(plain("flux", prompts[i // 2], seed=picture.seed)).astype(int)
        assert np.abs(pixels - expected).max() <= 1


def test_replicas_on_one_device_have_their_weights_there_by_turns(app: App) -> None:
    app.client.post("/v1/images/generations", json={"prompt": "a red fox", "n": 4, "num_inference_steps": 8})
    memories = [stats.ranks[0].memory for stats in replicas(app)]
    assert sum(memory.lease.is_held for memory in memories if memory.lease) <= 1
    for memory in memories:
        assert memory.lease is not None
        assert memory.lease.num_leases >= 2  # the first was for warming up
        assert memory.lease.loading_s > 0


def encoders(app: App) -> list[EncoderStats]:
    return both(app, "Encoder", lambda stats: stats.pid)


def test_what_one_encoder_has_encoded_the_other_does_not(app: App) -> None:
    before = sum(stats.num_forwards for stats in encoders(app))
    for prompt in ("a lamp", "a boat", "a lamp", "a boat", "a lamp", "a boat"):
        draw(app, prompt)
    assert sum(stats.num_forwards for stats in encoders(app)) - before == 2
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(lambda _: draw(app, "many boats"), range(10)))
    app.handle.generate.remote(prompt=["a pond", "a lamp", "a pond", "a boat"]).result()
    assert sum(stats.num_forwards for stats in encoders(app)) - before == 4


def test_a_prompt_whose_encoder_is_killed_is_encoded_by_the_other(app: App) -> None:
    before = {stats.pid: stats.num_forwards for stats in encoders(app)}
    picture = draw(app, "a lighthouse")
    [own] = [stats.pid for stats in encoders(app) if stats.num_forwards > before[stats.pid]]
    with ThreadPoolExecutor(6) as threads:
        drawn = threads.map(lambda i: draw(app, ("a lighthouse", f"a rock {i}")[i % 2]), range(6))
        os.kill(own, signal.SIGKILL)
        # Other requests share its batches, and a batch rounds differently.
        assert all(np.abs(other.astype(int) - picture).max() <= 1 for other in list(drawn)[::2])


LATENTS = DecodeArguments.of(torch.randn(1, 16, 96, 96, generator=torch.Generator().manual_seed(0)))
LARGE = GenerationRequest(
    Prompt("a red fox", None, is_guided=False), 768, 768, 1, 1, None, None, 0, "png", 100, fps=8
)
"""A request of some 250 tiles."""


@pytest.fixture(scope="module")
def tiled_in_one() -> bytes:
    """The image that one replica decodes from LATENTS."""
    return asyncio.run(Vae(MODEL, VaeConfig(tiling=64)).decode(LATENTS, LARGE)).data


def vaes(app: App) -> list[VaeStats]:
    return both(app, "Vae", lambda stats: stats.pid)


def test_a_large_picture_is_decoded_by_both_vaes_and_is_that_of_one(app: App, tiled_in_one: bytes) -> None:
    before = sum(stats.num_tiles for stats in vaes(app))
    media = app.deployment("Vae").decode.remote(LATENTS, LARGE).result()
    assert np.array_equal(pixels(media.data), pixels(tiled_in_one))
    assert sum(stats.num_tiles for stats in vaes(app)) > before


@pytest.mark.thorough
def test_a_vae_that_is_killed_loses_no_tile_of_anothers_picture(app: App, tiled_in_one: bytes) -> None:
    before = {stats.pid: stats.num_tiles for stats in vaes(app)}
    running = app.deployment("Vae").decode.remote(LATENTS, LARGE)
    deadline, helping = time.monotonic() + PATIENCE_S, list[int]()
    while not helping:
        assert time.monotonic() < deadline, "no other replica helps"
        helping = [stats.pid for stats in vaes(app) if stats.num_tiles > before[stats.pid]]
    os.kill(helping[0], signal.SIGKILL)
    assert np.array_equal(pixels(running.result().data), pixels(tiled_in_one))
