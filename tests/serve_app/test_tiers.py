"""Tests of `quality` and `step_cache` over HTTP, with OpenAI's client and others."""

import json
from typing import Any

import pytest
from openai import OpenAI

STEPS = 12


def ask(app: Any, **fields: Any) -> Any:
    body = {"prompt": "a cat", "seed": 3, "num_inference_steps": STEPS, **fields}
    return app.client.post("/v1/images/generations", json=body)


def drawn(app: Any, **fields: Any) -> tuple[Any, Any]:
    """Returns the answer and its first image."""
    answer = ask(app, **fields).raise_for_status().json()
    return answer, answer["data"][0]


@pytest.mark.parametrize("quality", [None, "auto", "high", "hd"])
def test_high_and_whatever_does_not_ask_for_less_is_lossless(flux_app: Any, quality: str | None) -> None:
    answer, picture = drawn(flux_app, **({} if quality is None else {"quality": quality}))
    assert answer["quality"] == "high"
    assert picture["forwards"] == {"computed": STEPS, "asked": STEPS}
    assert picture["warnings"] == []
    assert picture["b64_json"] == drawn(flux_app)[1]["b64_json"]


def test_lower_tiers_compute_less_and_say_so(flux_app: Any) -> None:
    high, medium, low = (drawn(flux_app, quality=quality) for quality in ("high", "medium", "low"))
    assert [answer["quality"] for answer, _ in (high, medium, low)] == ["high", "medium", "low"]
    computed = [picture["forwards"]["computed"] for _, picture in (high, medium, low)]
    assert computed == sorted(set(computed), reverse=True)
    assert len({picture["b64_json"] for _, picture in (high, medium, low)}) == 3


def test_openais_client_asks_for_a_tier(flux_app: Any) -> None:
    client = OpenAI(base_url=f"{flux_app.url}/v1", api_key="none")
    answer: Any = client.images.generate(
        model="tiny-flux", prompt="a cat", quality="low", extra_body={"num_inference_steps": STEPS}
    )
    assert answer.quality == "low"
    assert answer.data[0].forwards["computed"] < STEPS


def test_a_tier_without_effect_is_told(flux_app: Any) -> None:
    """With four steps nothing is reused, because the first three and the last are always computed."""
    answer, picture = drawn(flux_app, quality="medium", num_inference_steps=4)
    assert answer["quality"] == "high"
    [warning] = picture["warnings"]
    assert "quality: nothing was reused in 4 steps" in warning


def test_a_step_cache_of_the_requests_own_goes_before_quality(flux_app: Any) -> None:
    answer, picture = drawn(flux_app, quality="low", step_cache={"kind": "taylor_seer", "interval": 3, "order": 0})
    assert answer["quality"] is None
    assert picture["forwards"] == {"computed": 6, "asked": STEPS}
    assert drawn(flux_app, step_cache="easy_cache")[1]["forwards"]["asked"] == STEPS


@pytest.mark.parametrize(
    ("step_cache", "message"),
    [
        ({"kind": "tea_cache"}, "Input should be 'taylor_seer' or 'easy_cache'"),
        ({"kind": "taylor_seer", "interval": 1}, "greater than or equal to 2"),
        ({"kind": "easy_cache", "interval": 2}, "interval is only for kind taylor_seer"),
        ({"intervall": 2}, "did you mean 'interval'"),
        ([1], "step_cache"),
        ("tea", "Input should be"),
        ("{half", "not JSON"),
    ],
)
def test_a_wrong_step_cache_is_a_400_that_names_it(flux_app: Any, step_cache: Any, message: str) -> None:
    answer = ask(flux_app, step_cache=step_cache)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].startswith("step_cache")
    assert message in error["message"]


def test_the_stream_ends_with_the_tier(flux_app: Any) -> None:
    answer = ask(flux_app, quality="low", stream=True, partial_images=2).raise_for_status()
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    *partials, completed = events
    assert {event["quality"] for event in partials} <= {"auto"}
    assert completed["quality"] == "low"
    assert completed["forwards"]["computed"] < STEPS


def test_the_card_tells_the_tiers(flux_app: Any) -> None:
    card = flux_app.client.get("/v1/models/tiny-flux").json()
    assert card["tiers"]["medium"]["kind"] == card["tiers"]["low"]["kind"] == "taylor_seer"


def test_a_model_without_tiers_says_so_and_draws_without_loss(wan_app: Any) -> None:
    fields = {"prompt": "waves", "size": "64x64", "num_frames": 5, "seed": 9, "quality": "low"}
    answer = wan_app.client.post("/v1/videos/sync", json=fields).raise_for_status()
    computed, asked = answer.headers["X-Forwards"].split("/")
    assert computed == asked
    assert "this model has no tier low" in answer.headers["X-Warnings"]


def test_of_a_video_the_step_cache_may_be_a_forms_text(wan_app: Any) -> None:
    fields = {"prompt": "waves", "size": "64x64", "num_frames": 5, "num_inference_steps": STEPS, "seed": 9}
    form = {name: (None, str(value)) for name, value in fields.items()}
    form["step_cache"] = (None, json.dumps({"kind": "taylor_seer", "interval": 4}))
    answer = wan_app.client.post("/v1/videos/sync", files=form).raise_for_status()
    computed, asked = map(int, answer.headers["X-Forwards"].split("/"))
    assert computed == asked / 2
    assert "X-Warnings" not in answer.headers
