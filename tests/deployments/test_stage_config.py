"""Configs of stages: what they accept, and what follows from their values."""

import logging
import os
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from deployments.config.encoder import EncoderConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.memory.device import resolve_device, resolve_dtype

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize(
    ("config", "num_threads"),
    [
        (StageConfig(num_cpus=0.5), 1),
        (StageConfig(num_cpus=0), 1),
        (StageConfig(num_cpus=3.9), 3),
        (StageConfig(num_cpus=8, torch_threads=2), 2),
        (StageConfig(num_cpus=0.5, torch_threads=4), 4),
    ],
)
def test_a_stage_uses_the_threads_that_ray_reserves_unless_told_otherwise(
    config: StageConfig, num_threads: int
) -> None:
    assert config.num_threads == num_threads


@pytest.mark.parametrize(
    ("config", "num_ranks"),
    [
        (TransformerConfig(), 1),
        (TransformerConfig(shards=3), 3),
        (TransformerConfig(cuts=(4, 9)), 3),
        (TransformerConfig(shards=3, cuts=(4, 9)), 3),
        (EncoderConfig(), 1),
    ],
)
def test_cuts_or_shards_say_how_many_ranks_there_are(config: StageConfig, num_ranks: int) -> None:
    assert config.num_ranks == num_ranks


@pytest.mark.parametrize("cuts", [(0,), (5, 5), (7, 3), (-1, 4)])
def test_cuts_must_rise_from_one(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="cuts must be ascending block numbers from 1"):
        TransformerConfig(cuts=cuts)


def test_cuda_without_a_gpu_of_its_own_is_refused() -> None:
    with pytest.raises(ValidationError, match="device 'gpu' needs num_gpus > 0"):
        StageConfig(device="cuda")
    assert StageConfig(device="cuda", num_gpus=0.5).device == "gpu"


@no_cuda
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert resolve_device(StageConfig(num_gpus=1)) == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_is_cuda_only_where_ray_gives_the_replica_a_gpu() -> None:
    assert resolve_device(StageConfig(num_gpus=0.5)) == torch.device("cuda", 0)
    assert resolve_device(StageConfig(device="cuda", num_gpus=1)) == torch.device("cuda", 0)
    assert resolve_device(StageConfig()) == torch.device("cpu")


def test_a_named_cpu_is_taken_at_its_word() -> None:
    assert resolve_device(StageConfig(device="cpu", num_gpus=1)) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"num_gpus is 1, but torch .* sees no GPU.*nvidia-smi"):
        resolve_device(StageConfig(device="cuda", num_gpus=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_a_name_only_is_the_cpu_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    try:
        assert resolve_device(StageConfig(num_gpus=0.5)) == torch.device("cpu")
    finally:
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert "there is no GPU here: the stage runs on the CPU" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the model would run on the CPU while Ray reserves the GPU."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 24564\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="sees no GPU"):
        resolve_device(StageConfig(num_gpus=0.5))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_is_named_as_torch_names_it(name: str) -> None:
    assert resolve_dtype(StageConfig(dtype=name).dtype) == getattr(torch, name)
