"""Tests over HTTP that a warning tells what is cut off a long prompt, and that schedulers are chosen by name."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
LONG = "a tin robot and a paper moon under an old oak by the sea, " * 2 + "zebra 猫"


def ask(app: Any, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "a red cat", "seed": 3} | fields
    answer: dict[str, Any] = app.client.post("/v1/images/generations", json=body).raise_for_status().json()
    return answer


def test_what_was_cut_off_is_told_in_the_answer_and_again_from_the_cache(sd15_app: Any) -> None:
    for _ in range(2):
        [warning] = ask(sd15_app, prompt=LONG)["data"][0]["warnings"]
        assert warning.startswith("prompt: CLIP reads 77 tokens; ")
        assert "zebra" in warning
    assert ask(sd15_app)["data"][0]["warnings"] == []


def test_it_is_told_in_the_last_event_of_a_stream(sd15_app: Any) -> None:
    body = {"prompt": LONG, "stream": True, "seed": 3}
    events = sd15_app.client.post("/v1/images/generations", json=body).raise_for_status().text
    last = json.loads(events.strip().rpartition("data: ")[2])
    assert last["type"] == "image_generation.completed"
    assert "CLIP reads 77 tokens" in last["warnings"][0]


def test_it_is_told_in_a_videos_header_whatever_its_script(wan_app: Any) -> None:
    answer = wan_app.client.post("/v1/videos/sync", json={"prompt": "猫; " * 200}).raise_for_status()
    [told] = json.loads(answer.headers["X-Warnings"])
    assert told.startswith("prompt: UMT5 reads 64 tokens; ")
    assert "猫; 猫" in told


def test_a_scheduler_is_chosen_by_name_and_draws_as_in_plain_diffusers(
    sd15_app: Any, plain_pipeline: Callable[[str], Any], plain: Callable[..., Any]
) -> None:
    card = sd15_app.client.get("/v1/models").json()["data"][0]
    own, other = card["schedulers"]
    pipe = plain_pipeline("sd15")
    assert own == type(pipe.scheduler).__name__
    scheduler = pipe.scheduler
    pipe.scheduler = getattr(diffusers, other).from_config(scheduler.config)
    try:
        expected = plain("sd15", "a red cat", seed=3)
    finally:
        pipe.scheduler = scheduler
    pictures = {asked: _pixels(ask(sd15_app, scheduler=asked)) for asked in (own, other)}
    np.testing.assert_array_equal(pictures[other], np.asarray(expected))
    np.testing.assert_array_equal(pictures[own], _pixels(ask(sd15_app)))
    assert (pictures[own] != pictures[other]).any()


def test_one_that_is_not_allowed_is_refused_with_a_list(sd15_app: Any) -> None:
    body = {"prompt": "a cat", "scheduler": "HeunDiscreteScheduler"}
    refused = sd15_app.client.post("/v1/images/generations", json=body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "scheduler"
    assert error["message"].endswith("is not one of this model's: PNDMScheduler, DDIMScheduler")


def _pixels(answer: dict[str, Any]) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))
