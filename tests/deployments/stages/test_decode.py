"""Latents are decoded to pixels as the pipeline itself does it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from deployments.answers import DecodeArguments
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.errors import OutOfDeviceMemory
from deployments.request import GenerationRequest, Prompt
from deployments.stages.decode import Decoding
from tests.conftest import decoded_by

REQUEST = GenerationRequest(
    Prompt("a cat", None, True), 64, 64, 1, 2, guidance_scale=2.0, true_cfg_scale=None, seed=0,
    output_format="png", output_compression=100, fps=8,
)  # fmt: skip


@pytest.mark.parametrize(("family", "decodes_in"), [("sd15", torch.float16), ("sdxl", torch.float32)])
def test_a_vae_in_float16_decodes_in_what_its_pipeline_decodes_in(family: str, decodes_in: torch.dtype) -> None:
    """Both VAE configs set force_upcast, but only SDXL's pipeline follows it."""
    checkpoint = f"tiny://{family}"
    pipe = DiffusionPipeline.from_pretrained(fetch_checkpoint(checkpoint, ()), torch_dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.force_upcast

    def draw(output_type: str) -> np.ndarray | torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"width": 64, "height": 64, "num_inference_steps": 2, "generator": generator}
        return pipe("a cat", output_type=output_type, **size).images

    with decoded_by(pipe) as decoded:
        expected = (np.asarray(draw("np")) * 255).round().astype(np.uint8)
    stage = Decoding(ModelConfig(name="t", checkpoint=checkpoint, family=family), VaeConfig(dtype="float16"))
    [weights] = stage.residency.stats().weights_bytes
    assert weights.endswith(str(decodes_in).removeprefix("torch."))
    assert np.array_equal(stage.decode(DecodeArguments.of(decoded[0]), REQUEST), expected)


@pytest.mark.parametrize(("family", "shape"), [("wan", (1, 16, 2, 8, 8)), ("qwen-image", (1, 16, 1, 8, 8))])
def test_a_vae_that_fails_half_way_keeps_no_frames(family: str, shape: tuple[int, ...]) -> None:
    """The features that it keeps between frames would otherwise stay on the GPU until the next decode."""
    stage = Decoding(ModelConfig(name="t", checkpoint=f"tiny://{family}", family=family), VaeConfig())
    vae = stage._pipe.vae
    request = replace(REQUEST, num_frames=5 if family == "wan" else 1)
    found: list[int] = []

    def remembered() -> int:
        return sum(isinstance(kept, torch.Tensor) for kept in vae._feat_map)

    def fail(*_: object) -> None:
        found.append(remembered())
        raise torch.OutOfMemoryError("told so")

    hook = vae.decoder.conv_out.register_forward_hook(fail)
    with pytest.raises(OutOfDeviceMemory, match="told so"):
        stage.decode(DecodeArguments.of(torch.zeros(shape)), request)
    hook.remove()
    assert found[0] > 0
    assert remembered() == 0
