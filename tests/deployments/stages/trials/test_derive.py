"""Pipelines without an entry in `families`: the sizes and calls derived from the pipelines themselves."""

from functools import cache
from pathlib import Path

import diffusers
import pytest
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

from deployments.checkpoints.derived import derive_family, read_derived
from deployments.checkpoints.geometry import read_geometry
from deployments.checkpoints.source import fetch_checkpoint, with_family
from deployments.config.model import ModelConfig
from deployments.families import FAMILIES
from deployments.stages.trials.derive import RATIOS, Derived
from tests.thorough import usually

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
"""By tiny checkpoint: default width and height, and the number that sizes must be multiples of."""
QUICK = frozenset({"chroma", "pixart-sigma", "hunyuan-video", "ltx-video", "mochi"})
"""Checkpoints tested without --thorough: images and videos, and unusual multiples and frames."""


@cache
def folder(name: str) -> Path:
    return fetch_checkpoint(f"tiny://{name}", ())


@cache
def model(name: str) -> ModelConfig:
    pipeline_class = diffusers.DiffusionPipeline.load_config(folder(name))["_class_name"]
    derived = read_derived(pipeline_class, Derived(folder(name)).describe())
    return ModelConfig(name=name, checkpoint=str(folder(name))).with_derived_family(*derived)


@pytest.mark.parametrize(("name", "told"), usually(PIPELINES.items(), lambda of: of[0] in QUICK))
def test_sizes_are_those_that_the_pipeline_makes(name: str, told: tuple[int, int, int]) -> None:
    geometry = model(name).geometry
    assert (geometry.width, geometry.height, geometry.size_multiple) == told


@pytest.mark.parametrize("family", usually(FAMILIES, {"flux", "sdxl", "wan"}.__contains__))
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


def test_a_pipeline_that_chooses_one_of_its_sizes_tells_them_all() -> None:
    """Source: `Kandinsky5T2IPipeline.__init__`."""
    geometry = model("kandinsky5").geometry
    assert (geometry.width, geometry.height) == (1024, 1024)
    assert {tuple(size) for size in geometry.sizes} == {
        (1024, 1024),
        *((640, 1408), (768, 1280), (896, 1152)),
        *((1408, 640), (1280, 768), (1152, 896)),
    }


def test_a_pipeline_that_scales_what_is_asked_tells_sizes_of_every_usual_shape() -> None:
    """HiDream scales the size to its own area."""
    geometry = model("hidream").geometry
    ratios = [width / height for width, height in geometry.sizes]
    for usual in RATIOS:
        assert min(abs(ratio / usual - 1) for ratio in ratios) < 0.04, usual
    most = geometry.width * geometry.height
    assert all(0.9 * most < width * height <= most for width, height in geometry.sizes)


@pytest.mark.parametrize(("name", "multiple"), [("cogvideox", 8), ("mochi", 6), ("ltx-video", 8)])
def test_frames_are_told_by_what_the_vae_makes_of_them(name: str, multiple: int) -> None:
    """CogVideoX's VAE makes 4 frames of a latent one, and decodes two latent frames at a time."""
    assert model(name).geometry.frame_multiple == multiple


@pytest.mark.thorough
def test_a_pipeline_that_takes_its_size_from_the_picture_tells_those_that_it_makes() -> None:
    """The pipeline is that of HunyuanVideo 1.5; the tiny one makes 64 x 64 pixels."""
    sizes, processor = model("hunyuan-video15-i2v").geometry.sizes, HunyuanVideo15ImageProcessor()
    assert len(sizes) >= 3
    for width, height in sizes:
        assert processor.calculate_default_height_width(height, width, 64) == (height, width)


def test_a_kind_of_call_that_takes_another_size_than_is_asked_is_not_offered() -> None:
    """QwenImageEditInpaintPipeline takes its size from the image."""
    assert list(model("qwen-image-edit").architecture.calls) == ["edit"]


def test_a_class_that_diffusers_does_not_have_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a SoonPipeline, which cannot .*: the installed diffusers has"):
        derive_family(tmp_path, "SoonPipeline")
