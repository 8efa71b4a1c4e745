"""Pipelines that have no entry in `families`, as they tell of themselves and run: whole, and unmerged."""

from functools import cache
from pathlib import Path

import diffusers
import pytest

from deployments.checkpoints.derived import derive_family, read_derived
from deployments.checkpoints.geometry import read_geometry
from deployments.checkpoints.source import fetch_checkpoint, with_family
from deployments.config import ModelConfig
from deployments.families import FAMILIES
from deployments.stages.derive import Derived

PIPELINES = {
    "chroma": (1024, 1024, 16),
    "aura-flow": (1024, 1024, 16),
    "lumina2": (64, 64, 16),
    "pixart-sigma": (64, 64, 16),
    "ovis": (1024, 1024, 16),
    "hunyuan-video": (1280, 720, 16),
    "ltx-video": (704, 512, 32),
    "ideogram4": (2048, 2048, 16),
    "mochi": (848, 480, 16),
}
"""Tiny checkpoint to the size by default, and what sizes must be multiples of."""


@cache
def folder(name: str) -> Path:
    return fetch_checkpoint(f"tiny://{name}", ())


@cache
def model(name: str) -> ModelConfig:
    pipeline_class = diffusers.DiffusionPipeline.load_config(folder(name))["_class_name"]
    derived = read_derived(pipeline_class, Derived(folder(name)).describe())
    return ModelConfig(name=name, checkpoint=str(folder(name))).with_derived_family(*derived)


@pytest.mark.parametrize(("name", "told"), PIPELINES.items())
def test_sizes_are_those_that_the_pipeline_makes(name: str, told: tuple[int, int, int]) -> None:
    geometry = model(name).geometry
    assert (geometry.width, geometry.height, geometry.size_multiple) == told


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_with_an_entry_tells_the_same_of_itself(family: str) -> None:
    entry, told = FAMILIES[family], Derived(folder(family)).describe()
    _, geometry = read_derived(entry.pipeline_class, told)
    known = read_geometry(folder(family), entry)
    assert (geometry.width, geometry.height, geometry.size_multiple) == (
        known.width,
        known.height,
        known.size_multiple,
    )


def test_another_process_tells_it_to_whoever_has_no_torch() -> None:
    found = with_family(ModelConfig(name="tiny", checkpoint="tiny://chroma"))
    assert found.family == "ChromaPipeline"
    assert found.geometry == model("chroma").geometry


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("kandinsky5", "it chooses another size than it is asked for"),
    ],
)
def test_what_cannot_be_served_says_why(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Derived(folder(name)).describe()


def test_a_class_that_diffusers_does_not_have_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a SoonPipeline, which cannot .*: the installed diffusers has"):
        derive_family(tmp_path, "SoonPipeline")
