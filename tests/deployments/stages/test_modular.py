"""Modular pipelines: what is read from their blocks, and that requests leave nothing behind in them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from deployments.checkpoints.components import read_index
from deployments.checkpoints.derived import read_derived
from deployments.checkpoints.source import fetch_checkpoint, with_family
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.errors import WrongField
from deployments.families.sources import REQUIRED
from deployments.request import CallKind, Prompt
from deployments.stages import load_stage
from deployments.stages.modular import build_blocks, encoding_blocks
from deployments.stages.trials.derive import Derived
from tests.deployments import plain
from tests.deployments.modular_checkpoint import write_modular
from tests.deployments.variants import build_request, denoise, draw_staged, encode, load_denoising

ENCODERS = frozenset({"text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder"})


def blocks_of(pipeline: str) -> Any:
    pipeline_class = getattr(diffusers, f"{pipeline}ModularPipeline")
    names = {"_class_name": pipeline_class.__name__, "_blocks_class_name": pipeline_class.default_blocks_name}
    return build_blocks(names)


@cache
def model(name: str = "flux3") -> ModelConfig:
    folder = fetch_checkpoint(name if "/" in name else f"tiny://{name}", ())
    derived = read_derived(read_index(folder)["_class_name"], json.loads(json.dumps(Derived(folder).describe())))
    return ModelConfig(name=name, checkpoint=str(folder)).with_derived_family(*derived)


@pytest.fixture(scope="module")
def encoding() -> Any:
    return load_stage("encode", model(), EncoderConfig())


@pytest.fixture(scope="module")
def stage() -> Iterator[Any]:
    stage = load_denoising(model())
    yield stage
    stage.close()


@pytest.mark.parametrize(
    ("pipeline", "names"),
    [
        ("Flux", {"text_encoder"}),
        ("Flux3", {"text_encoder"}),
        ("StableDiffusionXL", {"text_encoder"}),
        ("QwenImageEdit", {"text_encoder.encode"}),
    ],
)
def test_blocks_that_reach_a_text_encoder_are_found(pipeline: str, names: set[str]) -> None:
    found = set(encoding_blocks(blocks_of(pipeline), ENCODERS))
    assert {name for name in found if "ip_adapter" not in name} == names


def test_a_block_that_rewrites_the_prompt_is_left_out() -> None:
    assert "prompt_upsampler" in diffusers.Flux3AutoBlocks().sub_blocks
    assert list(blocks_of("Flux3").sub_blocks) == ["text_encoder", "vae_encoder", "denoise", "decode"]


def test_what_a_call_takes_is_told_by_its_blocks() -> None:
    """With an input image, the size has no default: it is the image's."""
    calls = model().architecture.calls
    assert list(calls) == ["generate", "edit"]
    generate, edit = calls["generate"], calls["edit"]
    assert generate.parameters["prompt"] is REQUIRED
    assert (generate.parameters["height"], edit.parameters["height"]) == (1024, None)
    assert (generate.defaults.num_inference_steps, generate.defaults.guidance_scale) == (50, 3.5)
    assert (generate.max_images, edit.max_images) == (0, 10)


def test_a_distilled_model_is_not_guided() -> None:
    call = model("flux3-distilled").architecture.call
    assert (call.defaults.num_inference_steps, call.defaults.guidance_scale) == (16, None)
    assert "negative_prompt" not in call.parameters


def test_two_experts_have_a_scale_each(tmp_path: Path) -> None:
    folder = write_modular("Wan22ModularPipeline", tmp_path / "wan22")
    of = model(str(folder))
    assert (of.request_defaults.guidance_scale, of.request_defaults.guidance_scale_2) == (5.0, 3.0)
    request = replace(build_request(of), guidance_scale=4.0, guidance_scale_2=1.5)
    pipeline = plain.load_plain(fetch_checkpoint(str(folder), ()))
    pipeline.guider.guidance_scale, pipeline.guider_2.guidance_scale = 4.0, 1.5
    sizes = {"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 3, "output_type": "np"}
    generator = torch.Generator().manual_seed(request.seed)
    [expected], _ = plain.draw(pipeline, prompt=request.prompt.text, generator=generator, **sizes)
    np.testing.assert_array_equal(draw_staged(of, request), (expected * 255).round().astype(np.uint8))


def test_blocks_that_encode_nothing_without_guidance_are_told_by_the_field(tmp_path: Path) -> None:
    """Wan's blocks fail on a variable that they did not set."""
    of = model(str(write_modular("WanModularPipeline", tmp_path / "wan")))
    unguided = Prompt("a red cat", None, is_guided=False)
    request = replace(build_request(of), prompt=unguided, guidance_scale=1.0)
    with pytest.raises(WrongField, match="it fails at 1, but not at 5, the default") as refused:
        encode(of, request)
    assert refused.value.param == "guidance_scale"


@pytest.mark.thorough
def test_another_process_tells_it_to_whoever_has_no_torch() -> None:
    found = with_family(ModelConfig(name="tiny", checkpoint="tiny://flux3"))
    assert found.family == "Flux3ModularPipeline"
    assert found.architecture.calls == model().architecture.calls


def test_a_component_that_lies_elsewhere_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_checkpoint("tiny://flux3", ())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(folder, tmp_path / "flux3", ignore=shutil.ignore_patterns("model_index.json", "text_encoder"))
    with pytest.raises(ValueError, match=r"its text_encoder is not here: .* it is in text_encoder. Fetch"):
        Derived(fetch_checkpoint(str(tmp_path / "flux3"), ()))


def test_a_text_that_was_seen_costs_no_forward_at_another_size_or_scale(encoding: Any) -> None:
    """The change to no guidance costs a forward, because then the blocks make no negative embeddings."""
    request = replace(build_request(model()), prompt=Prompt("a red cat", "blurry", is_guided=True))
    costs = []
    for changes in ({}, {"width": 128}, {"guidance_scale": 5.0}, {"guidance_scale": 1.0}):
        before = encoding.num_forwards
        encoding.encode(replace(request, **changes))
        costs.append(encoding.num_forwards - before)
    assert costs == [1, 0, 0, 1]


def test_a_text_that_was_not_seen_is_not_recalled(encoding: Any) -> None:
    request = build_request(model())
    assert encoding.recall(replace(request, prompt=Prompt("a green cat", None, is_guided=True))) is None


@pytest.mark.parametrize("kind", ["generate", "edit"])
def test_a_request_leaves_nothing_in_the_pipeline_that_all_share(stage: Any, kind: CallKind) -> None:
    request = replace(build_request(model(), kind), guidance_scale=7.0)
    pipe = stage._calls.of(request)._pipe
    before, settings = dict(vars(pipe)), dict(pipe.config)
    stage.denoise(seat := stage.join(), None, request)
    stage.leave(seat)
    assert vars(pipe) == before
    assert dict(pipe.config) == settings
    assert pipe.guider.guidance_scale == 3.5


def test_what_would_be_decoded_after_the_last_step_is_what_is(stage: Any) -> None:
    """A partial image is what the end of the call makes of an earlier step's latents."""
    steps: list[torch.Tensor] = []
    request = build_request(model())
    encodings, seat = encode(model(), request), stage.join()
    arguments = stage.denoise(seat, encodings, request, lambda _step, latents: steps.append(latents))
    stage.leave(seat)
    finished = stage._calls.of(request).finish(request, stage._stand_ins(stage._zeros), encodings, steps[-1])
    assert len(steps) == request.num_inference_steps
    assert torch.equal(finished.latents, arguments.latents)


def test_encodings_of_another_call_are_not_taken_for_this_ones(stage: Any) -> None:
    request = build_request(model())
    others = tuple((f"not {name}", value) for name, value in encode(model(), request))
    with pytest.raises(RuntimeError, match=r"calls text_encoder where .* called not text_encoder"):
        denoise(stage, others, request)
