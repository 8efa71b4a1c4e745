"""Weights that stay in the checkpoint's files take no memory that the kernel cannot reclaim."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.stages import load_stage
from tests.deployments.memory.tiny_request import build_request


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD 1.5 with a UNet of 60 MiB in float32."""
    folder = tmp_path_factory.mktemp("mapped") / "sd15"
    pipe: Any = DiffusionPipeline.from_pretrained(fetch_checkpoint("tiny://sd15", ()), dtype=torch.float32)
    channels = [4 * width for width in pipe.unet.config.block_out_channels]
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "block_out_channels": channels})
    pipe.save_pretrained(folder)
    return folder


def private_bytes() -> int:
    """Returns the memory of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def open_stage(checkpoint: Path, **settings: Any) -> Any:
    model = ModelConfig(name="m", checkpoint=str(checkpoint), family="sd15")
    stage = load_stage("denoise", model, TransformerConfig(**settings))
    stage.connect(None, pytest.fail)
    return stage


def draw(stage: Any) -> torch.Tensor:
    latents: torch.Tensor = stage.denoise(
        stage.join(), None, build_request("sd15"), on_step=lambda *_: None
    ).latents
    stage.close()
    return latents


@pytest.mark.parametrize("settings", [{"vram_limit_gib": 0}, {"time_sharing": True}], ids=str)
def test_weights_stay_in_the_files_and_the_latents_are_the_same(
    checkpoint: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # keeps its leases to this test
    expected = draw(open_stage(checkpoint, vram_limit_gib=0))  # its copies are aligned as the files' are
    before = private_bytes()
    stage = open_stage(checkpoint, **settings, host_copy="files")
    stats = stage.loaded.residency.stats()
    total = sum(stats.weights_bytes.values())
    assert total > 50 * 2**20
    assert stats.mapped_bytes > 0.99 * total
    assert private_bytes() - before < 0.5 * total
    assert torch.equal(draw(stage), expected)
    if "vram_limit_gib" in settings:  # time sharing copies all weights to the device, here the CPU
        assert private_bytes() - before < 0.5 * total


def test_weights_in_another_dtype_are_refused(checkpoint: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unet.* is stored as float32, but dtype is bfloat16, and host_copy: files"
    ):
        open_stage(checkpoint, dtype="bfloat16", vram_limit_gib=0, host_copy="files")
