"""The strongest test: three stages in three processes draw what plain diffusers draws, bit for bit."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import ray
import torch
from diffusers import DiffusionPipeline

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config import EncoderConfig, ModelConfig, TransformerConfig, VaeConfig
from deployments.families import FAMILIES
from deployments.rank import exit_replica
from deployments.request import GenerationRequest, Prompt
from deployments.stages import load_stage

pytestmark = pytest.mark.slow
STAGE_ENV = {"env_vars": {"OMP_NUM_THREADS": "1"}}


class StageProcess:
    """A process that holds one stage of every family, loaded when first asked for."""

    def __init__(self) -> None:
        self._stages: dict[tuple[str, str], Any] = {}

    def call(self, stage: str, family: str, config: Any, method: str, *args: Any) -> Any:
        key = stage, family
        if key not in self._stages:
            model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}")
            self._stages[key] = load_stage(stage, model, family, config)
            if stage == "denoise":
                self._stages[key].connect(None, exit_replica)
        return getattr(self._stages[key], method)(*args)

    def denoise(self, family: str, embeds: Any, request: GenerationRequest) -> torch.Tensor:
        config = TransformerConfig()
        seat = self.call("denoise", family, config, "join")
        try:
            latents: torch.Tensor = self._stages["denoise", family].denoise(seat, embeds, request, lambda *_: None)
            return latents
        finally:
            self._stages["denoise", family].leave(seat)


Draw = Callable[[str, GenerationRequest], tuple[torch.Tensor, Any]]


@pytest.fixture(scope="module")
def draw(ray_cluster: None) -> Iterator[Draw]:
    """(latents, frames) by three processes."""
    actor = ray.remote(num_cpus=0.1, runtime_env=STAGE_ENV)(StageProcess)
    encoder, transformer, vae = (actor.remote() for _ in range(3))

    def run(family: str, request: GenerationRequest) -> tuple[torch.Tensor, Any]:
        tokens = 64 if FAMILIES[family].max_sequence_length else None
        encode = EncoderConfig(max_sequence_length=tokens)
        embeds = encoder.call.remote("encode", family, encode, "encode", request.prompt)
        latents = ray.get(transformer.denoise.remote(family, embeds, request))
        return latents, ray.get(vae.call.remote("decode", family, VaeConfig(), "decode", latents, request))

    yield run
    for process in (encoder, transformer, vae):
        ray.kill(process)


def request_of(
    family: str, *, guided: bool, width: int = 64, height: int = 64, seed: int = 3
) -> GenerationRequest:
    of = FAMILIES[family]
    scale = 3.0 if guided else 1.0
    guidance = of.defaults.guidance_scale if of.guidance == "true_cfg_scale" else scale
    return GenerationRequest(
        Prompt("a red cat", "blurry" if guided else None, guided),
        width,
        height,
        num_frames=5 if of.media == "video" else 1,
        num_inference_steps=3,
        guidance_scale=guidance,
        true_cfg_scale=scale if of.guidance == "true_cfg_scale" else None,
        seed=seed,
        output_format="mp4" if of.media == "video" else "png",
        output_compression=100,
        fps=16,
    )


def settings_of(family: str, request: GenerationRequest) -> dict[str, Any]:
    settings = {
        "negative_prompt": request.prompt.negative_text,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "true_cfg_scale": request.true_cfg_scale,
    }
    return {name: value for name, value in settings.items() if value is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("guided", "width", "height"), [(True, 64, 64), (False, 64, 64), (True, 96, 64)])
def test_three_processes_draw_what_the_plain_pipeline_draws(
    draw: Draw, plain: Callable[..., Any], family: str, guided: bool, width: int, height: int
) -> None:
    request = request_of(family, guided=guided, width=width, height=height)
    latents, frames = draw(family, request)
    settings = settings_of(family, request)
    assert torch.equal(latents, plain(family, "a red cat", seed=3, output_type="latent", **settings))
    expected = np.atleast_3d(plain(family, "a red cat", seed=3, output_type="np", **settings))
    expected = expected if expected.ndim == 4 else expected[None]
    np.testing.assert_array_equal(frames, (expected * 255).round().astype(np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_seed_or_prompt_draws_another_picture(draw: Draw, family: str) -> None:
    """Without this, equality could hold because nothing that was asked matters."""
    _, one = draw(family, request_of(family, guided=True, seed=3))
    _, other = draw(family, request_of(family, guided=True, seed=4))
    assert np.abs(one.astype(int) - other.astype(int)).max() > 8


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_defaults_are_those_of_the_pipelines_call(family: Any) -> None:
    call = inspect.signature(getattr(diffusers, family.pipeline_class).__call__).parameters
    for name in ("num_inference_steps", "guidance_scale", "true_cfg_scale", "num_frames", "max_sequence_length"):
        if name in call:
            ours = family.max_sequence_length if name == "max_sequence_length" else getattr(family.defaults, name)
            assert ours == call[name].default, name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_size_multiple_is_the_vaes_factor_times_the_patch(family: Any) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(fetch_checkpoint(f"tiny://{family.name}", ()))
    factor = getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial
    packed = 2 if family.name in {"flux", "qwen-image"} else 1  # these pipelines pack 2 x 2 latents themselves
    patch = getattr(pipe, family.denoiser).config.get("patch_size", 1) if packed == 1 else 2
    assert family.size_multiple == factor * (patch[-1] if isinstance(patch, tuple | list) else patch)
