"""Tests of the schedulers and prompt weights that a request may ask for. Over HTTP: test_prompts.py."""

from typing import Any

import pytest

from deployments.config.model import ModelConfig
from serve_app.config.app import ConfigError
from serve_app.config.check import check_defaults
from serve_app.config.limits import LimitsConfig
from serve_app.errors import BadRequest
from serve_app.models.card import model_card
from serve_app.validation import Validator
from tests.serve_app.test_validation import published

KARRAS = {"name": "karras", "class_name": "DPMSolverMultistepScheduler", "options": {"use_karras_sigmas": True}}


def build_model(own: str | None = "PNDMScheduler", **settings: Any) -> ModelConfig:
    model = ModelConfig(name="m", checkpoint="tiny://sd15", family="sd15", **settings)
    model = model.with_geometry(published("sd15"))
    return model if own is None else model.with_own_scheduler(own)


def scheduler_of(model: ModelConfig, **fields: Any) -> str | None:
    [request] = Validator(model, LimitsConfig()).requests({"prompt": "a cat"} | fields)
    return request.scheduler


@pytest.mark.parametrize(
    ("asked", "used"),
    [(None, None), ("PNDMScheduler", None), ("DDIMScheduler", "DDIMScheduler"), ("karras", "karras")],
)
def test_a_request_may_ask_for_what_the_config_lists_and_for_the_checkpoints_own(
    asked: str | None, used: str | None
) -> None:
    assert scheduler_of(build_model(schedulers=["DDIMScheduler", KARRAS]), scheduler=asked) == used


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (build_model(schedulers=["DDIMScheduler", KARRAS]), "PNDMScheduler, DDIMScheduler, karras"),
        (build_model(), "PNDMScheduler"),
        (build_model(None), "only the checkpoint's own, which is the default"),
    ],
)
@pytest.mark.parametrize("asked", ["DPMSolverMultistepScheduler", "ddimscheduler", "euler", "🐈"])
def test_another_is_refused_with_a_list_of_those_that_there_are(
    model: ModelConfig, known: str, asked: str
) -> None:
    with pytest.raises(BadRequest, match=f"is not one of this model's: {known}$") as refused:
        scheduler_of(model, scheduler=asked)
    assert refused.value.param == "scheduler"


@pytest.mark.parametrize("field", ["sampler", "sampler_name"])
def test_what_other_programs_call_it_is_told(field: str) -> None:
    with pytest.raises(BadRequest, match="did you mean scheduler"):
        scheduler_of(build_model(), **{field: "Euler a"})


def test_the_card_lists_them_the_default_first() -> None:
    model = build_model(schedulers=["DDIMScheduler", KARRAS])
    assert model_card(model, 0, LimitsConfig()).schedulers == ("PNDMScheduler", "DDIMScheduler", "karras")


@pytest.mark.parametrize(
    "scheduler",
    [
        {"class_name": "PNDMScheduler", "options": {"skip_prk_steps": True}},
        {"name": "PNDMScheduler", "class_name": "DDIMScheduler"},
    ],
)
def test_what_no_request_could_tell_from_the_checkpoints_own_is_refused(scheduler: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="PNDMScheduler is the name of the checkpoint's own: set `name`"):
        check_defaults(build_model(schedulers=[scheduler]), LimitsConfig())


@pytest.mark.parametrize(
    ("can", "asked", "weighs"),
    [(False, None, False), (False, False, False), (True, None, True), (True, False, False)],
)
def test_words_weigh_where_the_model_can_and_the_request_does_not_decline(
    can: bool, asked: bool | None, weighs: bool
) -> None:
    validator = Validator(build_model(prompt_weighting=can), LimitsConfig())
    [request] = validator.requests({"prompt": "a (red)1.3 cat", "prompt_weighting": asked})
    assert request.prompt.is_weighted == weighs


def test_weights_that_the_model_cannot_read_are_refused() -> None:
    with pytest.raises(BadRequest, match="reads prompts as they are") as refused:
        scheduler_of(build_model(), prompt_weighting=True)
    assert refused.value.param == "prompt_weighting"
