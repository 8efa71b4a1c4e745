"""NaN and infinity are errors that say what to do, not black images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.answers import DecodeArguments
from deployments.config.encoder import EncoderConfig
from deployments.config.vae import VaeConfig
from deployments.errors import NonFinite
from deployments.stages import load_stage
from tests.deployments.variants import (
    build_request,
    denoise,
    encode,
    load_denoising,
    read_model,
    set_scheduler,
    write_tiny,
)

ZERO_SNR = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def blow_up(file: Path, ending: str) -> None:
    """Scales weights so that they still fit float16, but their products do not."""
    weights = load_file(file)
    [name] = [key for key in weights if key.endswith(ending)]
    weights[name] = (weights[name] * 1e6).clamp(-6e4, 6e4)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "scheduler", "changes", "class_name"),
    [
        ("qwen-image", None, {"num_inference_steps": 1}, "QwenImagePipeline"),
        ("sd15", {**ZERO_SNR, "prediction_type": "epsilon"}, {}, "StableDiffusionPipeline"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_scheduler_that_divides_by_zero_is_named(
    tmp_path: Path, family: str, scheduler: Mapping[str, Any] | None, changes: Mapping[str, Any], class_name: str
) -> None:
    folder = write_tiny(family, tmp_path / "x")
    if scheduler is not None:
        set_scheduler(folder, "DDIMScheduler", **scheduler)
    model = read_model(folder)
    stage, request = load_denoising(model), build_request(model, **changes)
    with pytest.raises(NonFinite, match=f"{class_name} with .*Ask for more num_inference_steps, or check"):
        denoise(stage, encode(model, request), request)
    assert stage.finite.num_refused == 1
    stage.close()


def test_what_the_model_makes_infinite_is_not_laid_to_the_scheduler(tmp_path: Path) -> None:
    model = read_model(write_tiny("flux", tmp_path / "x"))
    stage, request = load_denoising(model), build_request(model)
    prompt_embeds, pooled, ids = dict(encode(model, request))["encode_prompt"]
    encodings = (("encode_prompt", (prompt_embeds + float("inf"), pooled, ids)),)
    with pytest.raises(NonFinite, match=r"after 3 steps of FluxPipeline.*: transformer\.dtype is "):
        stage.denoise(stage.join(), encodings, request)
    stage.close()


def test_a_vae_that_overflows_in_float16_says_so(tmp_path: Path) -> None:
    folder = write_tiny("sd15", tmp_path / "x")
    blow_up(folder / "vae/diffusion_pytorch_model.safetensors", "decoder.up_blocks.0.resnets.0.conv2.weight")
    model = read_model(folder)
    stage = load_stage("decode", model, VaeConfig(dtype="float16"))
    with pytest.raises(NonFinite, match=r"AutoencoderKL .* NaN or infinite: .* set vae\.dtype to bfloat16 or"):
        stage.decode(DecodeArguments.of(torch.ones(1, 4, 8, 8)), build_request(model))
    assert stage.finite.num_refused == 1
    wider = load_stage("decode", model, VaeConfig(dtype="bfloat16"))
    assert wider.decode(DecodeArguments.of(torch.ones(1, 4, 8, 8)), build_request(model)).any()


def test_a_text_encoder_that_overflows_in_float16_says_so(tmp_path: Path) -> None:
    folder = write_tiny("sd15", tmp_path / "x")
    blow_up(folder / "text_encoder/model.safetensors", "layers.0.mlp.fc2.weight")
    model = read_model(folder)
    stage = load_stage("encode", model, EncoderConfig(dtype="float16"))
    with pytest.raises(
        NonFinite,
        match=r"encode_prompt of StableDiffusionPipeline returned .* set encoder\.dtype to bfloat16",
    ):
        stage.encode(build_request(model))
    assert stage.finite.num_refused == 1
