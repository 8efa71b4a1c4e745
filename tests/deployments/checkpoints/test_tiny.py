"""Tiny checkpoints are complete, repeatable, and suitable for the tests that depend on them."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from torch import nn

from deployments.checkpoints.source import FAMILY_BY_PIPELINE
from deployments.checkpoints.tiny.names import TINY_FAMILIES
from deployments.checkpoints.tiny.write import write_tiny_checkpoint

MAX_CHECKPOINT_BYTES = 8_000_000
NF4_BLOCK = 64
"""Weights per block in bitsandbytes' 4-bit formats; a Linear must read a whole number of them."""

every_family = pytest.mark.parametrize("family", TINY_FAMILIES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny checkpoint per family."""
    root = tmp_path_factory.mktemp("tiny")
    for family in TINY_FAMILIES:
        write_tiny_checkpoint(family, root / family)
    return root


@pytest.fixture(scope="module")
def pipelines(checkpoints: Path) -> dict[str, DiffusionPipeline]:
    loaded = {family: DiffusionPipeline.from_pretrained(checkpoints / family) for family in TINY_FAMILIES}
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


def find_denoiser(pipeline: DiffusionPipeline) -> nn.Module:
    denoiser = pipeline.components.get("unet") or pipeline.components["transformer"]
    assert isinstance(denoiser, nn.Module)
    return denoiser


def digest_files(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def draw(pipeline: DiffusionPipeline, family: str, prompt: str) -> torch.Tensor:
    """Draws two steps at 64 px; returns `[3, 64, 64]` in 0..1, or `[5, 3, 64, 64]` for a video."""
    size = {"height": 64, "width": 64} | ({"num_frames": 5} if family == "wan" else {})
    generator = torch.Generator().manual_seed(0)
    output = pipeline(
        prompt, num_inference_steps=2, generator=generator, output_type="pt", return_dict=False, **size
    )
    media = output[0][0]
    assert isinstance(media, torch.Tensor)
    return media


def test_every_family_that_can_be_detected_has_a_tiny_checkpoint() -> None:
    assert set(TINY_FAMILIES) == set(FAMILY_BY_PIPELINE.values())


@every_family
def test_a_tiny_checkpoint_draws_a_finite_picture_that_is_not_flat(
    pipelines: dict[str, DiffusionPipeline], family: str
) -> None:
    media = draw(pipelines[family], family, "a red fox")
    assert media.shape[-3:] == (3, 64, 64)
    assert media.isfinite().all()
    assert media.std() > 0.05


@every_family
def test_another_prompt_changes_the_picture_by_more_than_rounding_to_8_bits(
    pipelines: dict[str, DiffusionPipeline], family: str
) -> None:
    fox, sea = (draw(pipelines[family], family, prompt) for prompt in ("a red fox", "a blue sea"))
    assert (fox - sea).abs().max() > 8 / 255


@every_family
def test_two_writes_are_equal_byte_for_byte(checkpoints: Path, tmp_path: Path, family: str) -> None:
    torch.rand(7)  # the caller's random state must not matter
    write_tiny_checkpoint(family, tmp_path / "again")
    assert digest_files(tmp_path / "again") == digest_files(checkpoints / family)


@every_family
def test_a_tiny_checkpoint_is_small(checkpoints: Path, family: str) -> None:
    size_bytes = sum(path.stat().st_size for path in (checkpoints / family).rglob("*") if path.is_file())
    assert size_bytes < MAX_CHECKPOINT_BYTES


@every_family
def test_no_parameter_is_constant(pipelines: dict[str, DiffusionPipeline], family: str) -> None:
    modules = [module for module in pipelines[family].components.values() if isinstance(module, nn.Module)]
    constant = [
        name
        for module in modules
        for name, parameter in module.named_parameters()
        if bool((parameter == parameter.flatten()[0]).all())
    ]
    assert constant == []


@every_family
def test_every_linear_of_the_denoiser_can_be_quantised_to_4_bits(
    pipelines: dict[str, DiffusionPipeline], family: str
) -> None:
    linears = [module for module in find_denoiser(pipelines[family]).modules() if isinstance(module, nn.Linear)]
    assert {linear.in_features % NF4_BLOCK for linear in linears} == {0}
    assert max(linear.in_features for linear in linears) >= 128


@every_family
def test_a_pipeline_loaded_without_a_dtype_computes_in_float32(
    pipelines: dict[str, DiffusionPipeline], family: str
) -> None:
    modules = [module for module in pipelines[family].components.values() if isinstance(module, nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}


def test_the_qwen_template_is_spelled_in_the_tokens_that_the_pipeline_drops(
    pipelines: dict[str, DiffusionPipeline],
) -> None:
    pipeline = pipelines["qwen-image"]
    assert isinstance(pipeline, QwenImagePipeline)
    before_prompt = pipeline.prompt_template_encode.split("{}")[0]
    assert len(pipeline.tokenizer(before_prompt).input_ids) == pipeline.prompt_template_encode_start_idx


def test_writing_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_tiny_checkpoint("wan", tmp_path / "wan")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_family_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'dalle'; choose one of: flux, sd15, sdxl, sd3, qwen-image, wan"):
        write_tiny_checkpoint("dalle", tmp_path / "dalle")


def test_a_folder_with_something_in_it_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        write_tiny_checkpoint("wan", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "wan").mkdir()
    write_tiny_checkpoint("wan", tmp_path / "wan")
    assert [entry.name for entry in tmp_path.iterdir()] == ["wan"]
    assert (tmp_path / "wan" / "model_index.json").is_file()
