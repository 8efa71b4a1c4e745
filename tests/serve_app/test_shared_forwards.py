"""Tests over HTTP of a served model whose ranks share each forward, also when one of them is killed."""

import base64
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve

from serve_app.app import build_app, resolve_family
from serve_app.config.serve_file import parse_app_config
from tests.app import PATIENCE_S, App
from tests.thorough import usually

pytestmark = [pytest.mark.slow, pytest.mark.thorough]
RESOURCES = {"num_cpus": 0.1}
BODY = {"prompt": "a red cat", "seed": 3, "num_inference_steps": 40}


@pytest.fixture(scope="module")
def app(serve_url: str) -> Iterator[App]:
    config = resolve_family(
        parse_app_config(
            {
                "model": {
                    "name": "tiny-flux",
                    "checkpoint": "tiny://flux",
                    "defaults": {"width": 64, "height": 64, "num_inference_steps": 4},
                },
                "encoder": RESOURCES | {"max_sequence_length": 64},
                "transformer": RESOURCES | {"shards": 2, "context_parallel": 2},
                "vae": RESOURCES,
                "ingress": {"num_replicas": 1},
            }
        )
    )
    handle = serve.run(build_app(config), name="shared", route_prefix="/shared")
    app = App(serve_url, "shared", handle, config.served[0].model)
    yield app
    app.client.close()
    serve.delete("shared")


def ranks(app: App) -> tuple[Any, ...]:
    return tuple(app.deployment("Transformer").stats.remote().result().ranks)


def test_both_ranks_of_a_shard_compute_every_micro_batch_and_hold_its_weights(app: App) -> None:
    assert draw(app).status_code == 200
    all_ranks = ranks(app)
    assert len({rank.pid for rank in all_ranks}) == 4
    assert len({rank.num_micro_batches for rank in all_ranks}) == 1
    for one, other in (all_ranks[:2], all_ranks[2:]):
        assert one.num_micro_batches > 0
        assert one.memory.weights_bytes == other.memory.weights_bytes
        assert one.blocks == other.blocks
    assert all_ranks[0].blocks != all_ranks[2].blocks


@pytest.mark.parametrize("lost", usually([0, 1, 2, 3], {3}.__contains__))
def test_a_request_survives_the_death_of_any_rank(app: App, lost: int) -> None:
    """The replica ends with the rank. The ingress repeats the request on its successor: the image is the same."""
    before, pids = draw(app), {rank.pid for rank in ranks(app)}
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(draw(app)))
    asking.start()
    app.wait_for_seats(1)
    os.kill(ranks(app)[lost].pid, signal.SIGKILL)
    asking.join(PATIENCE_S * 2)
    assert [answer.status_code for answer in answers] == [200]
    assert np.abs(pixels(answers[0]) - pixels(before)).max() <= 1
    deadline = time.monotonic() + PATIENCE_S
    while not pids.isdisjoint(rank.pid for rank in ranks(app)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def pixels(answer: httpx.Response) -> np.ndarray:
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    return np.asarray(picture).astype(int)


def draw(app: App) -> httpx.Response:
    return app.client.post("/v1/images/generations", json=BODY)
