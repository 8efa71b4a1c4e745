"""A checkpoint that cannot serve is refused at start, and a request's mistakes are told apart from the stage's."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.config.encoder import EncoderConfig
from deployments.config.model import DefaultsConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.errors import CannotServe, WrongField
from deployments.families import FAMILIES
from deployments.stages import load_stage
from deployments.stages.trials.trial import NOT_ON_META
from tests.deployments.variants import (
    build_request,
    denoise,
    edit,
    encode,
    load_denoising,
    read_model,
    set_model,
    set_scheduler,
    write_tiny,
)
from tests.thorough import usually

ON_META = torch.empty(2, 3, device="meta")
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NO_T5 = {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
NO_CLIP = {"text_encoder": [None, None], "tokenizer": [None, None]}


@pytest.mark.parametrize(
    ("class_name", "config", "cause"),
    [
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "ValueError: .*does not support custom sigmas"),
        ("DEISMultistepScheduler", {"use_flow_sigmas": True}, "AssertionError: in set_timesteps, at `assert "),
        ("DDPMScheduler", {}, "ValueError: .*custom sigmas"),
    ],
)
def test_a_scheduler_that_its_pipeline_cannot_drive_is_refused_at_start(
    tmp_path: Path, class_name: str, config: Mapping[str, Any], cause: str
) -> None:
    folder = write_tiny("flux", tmp_path / "x")
    set_scheduler(folder, class_name, **config)
    message = rf"the denoise stage cannot run FluxPipeline with {class_name}: {cause}.*Save the checkpoint with"
    with pytest.raises(CannotServe, match=message):
        load_stage("denoise", read_model(folder), TransformerConfig())


@pytest.mark.parametrize(
    "asked",
    [
        lambda: bool(ON_META[0, 0] > 0),
        lambda: ON_META + torch.ones(2, 3),
        lambda: torch.nn.Linear(3, 3, device="meta")(torch.ones(1, 3)),
        lambda: ON_META.repeat_interleave(ON_META[:, 0].long(), dim=0),
        lambda: torch.autocast("meta").__enter__(),
        lambda: torch.amp.autocast("meta", dtype=torch.float32).__enter__(),
    ],
)
def test_what_no_model_may_ask_of_tensors_without_values_is_known_by_what_torch_says(asked: Any) -> None:
    with pytest.raises(RuntimeError, match=NOT_ON_META):
        asked()


@pytest.mark.parametrize(
    "asked",
    [lambda: ON_META @ ON_META, lambda: torch.nn.Linear(4, 4, device="meta")(ON_META), lambda: ON_META.view(5)],
)
def test_shapes_that_fit_on_no_device_are_told_from_that(asked: Any) -> None:
    with pytest.raises(RuntimeError) as told:
        asked()
    assert not NOT_ON_META.search(f"{told.value}, as metadata of the metal say")


@pytest.mark.parametrize(
    ("family", "class_name"),
    [
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        ("flux", "FluxImg2ImgPipeline"),
        ("qwen-image", "QwenImageImg2ImgPipeline"),
        ("sd3", "StableDiffusion3Img2ImgPipeline"),
    ],
)
def test_a_pipeline_that_needs_a_picture_is_refused_under_a_family_set_by_hand(
    tmp_path: Path, family: str, class_name: str
) -> None:
    folder = write_tiny(family, tmp_path / "x")
    edit(folder / "model_index.json", _class_name=class_name)
    with pytest.raises(
        CannotServe, match=f"`family: {family}` is for checkpoints that run like .*{class_name} does"
    ):
        load_stage("denoise", read_model(folder, family), TransformerConfig())


def test_wans_second_half_without_its_transformer_is_refused_at_start(tmp_path: Path) -> None:
    folder = write_tiny("wan", tmp_path / "x")
    edit(folder / "model_index.json", transformer_2=[None, None], boundary_ratio=0.875)
    with pytest.raises(CannotServe, match="the denoise stage cannot run WanPipeline"):
        load_stage("denoise", read_model(folder), TransformerConfig())


def test_a_denoiser_of_another_number_of_channels_than_the_vae_is_refused_at_start(tmp_path: Path) -> None:
    """An inpainting UNet takes 9 channels."""
    folder = write_tiny("sd15", tmp_path / "x")
    set_model(folder, "unet", "UNet2DConditionModel", in_channels=9)
    with pytest.raises(CannotServe, match=r"size of tensor a \(9\) must match the size of tensor b \(4\)"):
        load_stage("denoise", read_model(folder), TransformerConfig())


def test_sizes_assumed_where_the_app_was_built_are_compared_with_the_checkpoints(tmp_path: Path) -> None:
    folder, family = write_tiny("sd15", tmp_path / "x"), FAMILIES["sd15"]
    model = read_model(folder).with_geometry(family.geometry(family.published))
    with pytest.raises(CannotServe, match=r"the app was built for other sizes than .* makes"):
        load_stage("denoise", model, TransformerConfig())


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("flux", NO_T5, "FluxPipeline: .*NoneType.*; the checkpoint leaves out text_encoder_2, tokenizer_2$"),
        ("sd3", NO_CLIP, "StableDiffusion3Pipeline: .*NoneType.*leaves out text_encoder, tokenizer$"),
    ],
)
def test_a_text_encoder_that_is_missed_is_told_at_start(
    tmp_path: Path, family: str, entries: Mapping[str, Any], message: str
) -> None:
    folder = write_tiny(family, tmp_path / "x")
    edit(folder / "model_index.json", **entries)
    with pytest.raises(CannotServe, match=rf"the encode stage .*{message}"):
        load_stage("encode", read_model(folder), EncoderConfig())


def test_texts_too_narrow_for_the_denoiser_are_told_at_start(tmp_path: Path) -> None:
    folder = write_tiny("sdxl", tmp_path / "x")
    edit(folder / "model_index.json", **NO_CLIP)
    with pytest.raises(CannotServe, match=r"its unet does not take .* of width 64, not 128"):
        load_stage("denoise", read_model(folder), TransformerConfig())


def test_a_vae_of_another_factor_than_its_config_says_is_told_at_start(tmp_path: Path) -> None:
    folder = write_tiny("wan", tmp_path / "x")
    edit(folder / "vae" / "config.json", scale_factor_spatial=16)
    with pytest.raises(
        CannotServe, match="AutoencoderKLWan: ValueError: AutoencoderKLWan made 32x32x9 from latents for 64x64x9"
    ):
        load_stage("decode", read_model(folder), VaeConfig())


def test_a_vae_of_another_stride_than_its_config_says_is_told_at_start(tmp_path: Path) -> None:
    """With a single frame the wrong stride would not show."""
    folder = write_tiny("wan", tmp_path / "x")
    edit(folder / "vae" / "config.json", scale_factor_temporal=8)
    with pytest.raises(CannotServe, match="AutoencoderKLWan made 32x32x9 from latents for 32x32x17"):
        load_stage("decode", read_model(folder), VaeConfig())


@pytest.mark.parametrize("steps", [51, 60])
def test_more_steps_than_the_scheduler_knows_are_the_requests_mistake(tmp_path: Path, steps: int) -> None:
    folder = write_tiny("sd15", tmp_path / "x")
    set_scheduler(folder, "LCMScheduler", **SD_BETAS)
    model = read_model(folder)
    stage, request = load_denoising(model), build_request(read_model(folder), num_inference_steps=steps)
    with pytest.raises(WrongField, match="StableDiffusionPipeline with LCMScheduler does not take") as wrong:
        denoise(stage, encode(model, request), request)
    assert wrong.value.param == "num_inference_steps"
    usual = replace(request, num_inference_steps=2)
    assert denoise(stage, encode(model, usual), usual).latents.shape == (1, 4, 8, 8)
    stage.close()


def test_defaults_that_no_request_could_have_are_told_at_start(tmp_path: Path) -> None:
    folder = write_tiny("sd15", tmp_path / "x")
    set_scheduler(folder, "LCMScheduler", **SD_BETAS)
    model = read_model(folder, defaults=DefaultsConfig(num_inference_steps=60))
    with pytest.raises(CannotServe, match="with LCMScheduler: ValueError"):
        load_stage("denoise", model, TransformerConfig())


def test_a_scheduler_that_knows_fewer_steps_than_the_default_says_what_to_set(tmp_path: Path) -> None:
    folder = write_tiny("sd15", tmp_path / "x")
    set_scheduler(folder, "LCMScheduler", original_inference_steps=20, **SD_BETAS)
    with pytest.raises(CannotServe, match=r"Set model.defaults.num_inference_steps, which is 50: with 4 it runs"):
        load_stage("denoise", read_model(folder), TransformerConfig())
    few = DefaultsConfig(num_inference_steps=8)
    load_stage("denoise", read_model(folder, defaults=few), TransformerConfig())


def test_what_fails_for_the_models_answers_is_not_the_requests_mistake(tmp_path: Path) -> None:
    model = read_model(write_tiny("sd15", tmp_path / "x"))
    stage, request = load_denoising(model), build_request(model)
    encodings = (("encode_prompt", (torch.zeros(1, 77, 3), torch.zeros(1, 77, 3))),)
    with pytest.raises(RuntimeError, match="shape"):
        stage.denoise(stage.join(), encodings, request)
    stage.close()


def test_a_component_that_is_left_out_needs_no_folder(tmp_path: Path) -> None:
    folder = write_tiny("sd3", tmp_path / "x")
    shutil.rmtree(folder / "text_encoder_3")
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert json.loads((folder / "model_index.json").read_text())["tokenizer_3"] == [None, None]
    model = read_model(folder)
    encodings = load_stage("encode", model, EncoderConfig(max_sequence_length=16)).encode(build_request(model))
    made = dict(encodings)["encode_prompt"][0]
    assert not made[:, 77:].any()


@pytest.mark.parametrize("name", usually(FAMILIES, {"flux", "wan"}.__contains__))
def test_every_kind_of_call_takes_predictions_that_come_late(tmp_path: Path, name: str) -> None:
    model = read_model(write_tiny(name, tmp_path / "x"))
    stage = load_stage("denoise", model, TransformerConfig(parallel_guidance=True))
    assert stage.pending_kinds == set(model.architecture.calls)
