"""Configs of schedulers: what they accept and what they refuse."""

import diffusers
import pytest

from deployments.config.model import ModelConfig
from deployments.options.schedulers import scheduler_classes


def build_model(*schedulers: object) -> ModelConfig:
    return ModelConfig(name="m", checkpoint="tiny://sd15", schedulers=list(schedulers))


def test_a_name_alone_is_a_class_of_diffusers() -> None:
    [scheduler] = build_model("DDIMScheduler").schedulers
    assert (scheduler.asked_as, scheduler.class_name, scheduler.options) == ("DDIMScheduler", "DDIMScheduler", {})


def test_requests_call_it_as_the_config_does() -> None:
    asked = {"name": "karras", "class_name": "DPMSolverMultistepScheduler", "options": {"use_karras_sigmas": True}}
    model = build_model(asked, "DDIMScheduler").with_own_scheduler("PNDMScheduler")
    assert model.scheduler_names == ("PNDMScheduler", "karras", "DDIMScheduler")


@pytest.mark.parametrize(
    ("schedulers", "message"),
    [
        (["DDIMSchedular"], r"no scheduler 'DDIMSchedular' \(did you mean DDIMScheduler\?\)"),
        (["Euler"], "no scheduler 'Euler'; it has .*EulerDiscreteScheduler"),
        (["DDIMScheduler", "DDIMScheduler"], "two schedulers are called 'DDIMScheduler'"),
        ([{"options": {}}], "class_name"),
    ],
)
def test_what_cannot_be_meant_is_refused(schedulers: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(*schedulers)


def test_the_source_has_every_scheduler_that_diffusers_gives_out() -> None:
    public = {name for name in diffusers._import_structure["schedulers"] if name.endswith("Scheduler")}
    assert public <= scheduler_classes() | {"KarrasVeScheduler", "ScoreSdeVpScheduler"}
