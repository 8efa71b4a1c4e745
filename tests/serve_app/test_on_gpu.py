"""Through the running app, with a part of a GPU for every process: what one user sees of it."""

import base64
import io
from collections.abc import Callable
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
