"""Tests of a running app, each of whose processes has a part of a GPU."""

import base64
import io
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PATIENCE_S = 60.0
BODY = {"prompt": "a red cat", "size": "64x64", "seed": 7}


@pytest.fixture
def app(start_app: Callable[..., Any]) -> Any:
    return start_app("flux", shards=2, num_gpus=0.2)


def test_a_picture_is_the_plain_pipelines(app: Any, plain: Callable[..., Any]) -> None:
    answer = app.client.post("/v1/images/generations", json=BODY)
    assert answer.status_code == 200, answer.text
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).convert("RGB")
    expected = np.asarray(plain("flux", "a red cat", seed=7)).astype(int)
    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 2


def test_every_process_has_its_weights_on_the_gpu_and_knows_its_share(app: Any) -> None:
    status = app.client.get("/v1/status").json()
    encoder, transformer, vae = (status[stage]["replicas"][0] for stage in ("encoder", "transformer", "vae"))
    memories = [process["memory"] for process in (encoder, *transformer["ranks"], vae)]
    assert len(memories) == 4
    for memory in memories:
        assert {place.partition(" ")[0] for place in memory["weights_bytes"]} == {"cuda:0"}
        assert memory["limit_bytes"] > 0


@pytest.mark.pretended_gpu
@pytest.mark.parametrize(("stage", "rank"), [("encoder", 0), ("transformer", 0), ("transformer", 1), ("vae", 0)])
def test_a_gpu_that_is_lost_costs_no_request_and_its_replica_comes_back(
    app: Any, lose_gpu: Callable[[str], AbstractContextManager[None]], stage: str, rank: int
) -> None:
    before = process_of(app, stage, rank)
    assert before is not None
    whose = "ray::Rank" if rank else f"ServeReplica:{app.name}:{stage.capitalize()}"
    with lose_gpu(whose):
        wait_until(lambda: not Path(f"/proc/{before}").exists())
    answer = app.client.post("/v1/images/generations", json=BODY)
    assert answer.status_code == 200, answer.text
    wait_until(lambda: process_of(app, stage, rank) not in (None, before))


def process_of(app: Any, stage: str, rank: int) -> int | None:
    """Returns the process id of this rank, or None while the process does not exist."""
    replicas = app.client.get("/v1/status").json()[stage]["replicas"]
    if not replicas:
        return None
    pid: int = replicas[0]["ranks"][rank]["pid"] if stage == "transformer" else replicas[0]["pid"]
    return pid


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
