"""Tests of the check that the Ray cluster has the capacity for an app, with a real cluster."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.machines.nodes import cluster_gpus, driver_memory_bytes, has_autoscaler, run_in_ray_task
from deployments.request import MediaSize
from serve_app.app import build_app
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.capacity_check import describe
from serve_app.config.serve_file import parse_app_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config(**transformer: Any) -> AppConfig:
    model = {"name": "t", "checkpoint": "tiny://flux", "family": "flux"}
    return parse_app_config({"model": model, "transformer": transformer})


def test_an_app_that_finds_no_gpus_is_refused_before_it_starts() -> None:
    shards = torch.cuda.device_count() + 1
    with pytest.raises(ConfigError, match=rf"denoise {shards} x 0.79 GPU, and the cluster has .* add GPUs"):
        build_app(config(num_gpus=0.79, shards=shards))
    assert not has_autoscaler()


def test_memory_is_planned_in_a_process_of_its_own() -> None:
    """The process that builds the app thereby imports no torch."""
    assert run_in_ray_task(lambda: os.getpid()) != os.getpid()


def test_gpus_are_those_that_ray_counts() -> None:
    assert len(cluster_gpus()) == torch.cuda.device_count()


@pytest.mark.thorough
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_driver_tells_a_little_more_than_torch() -> None:
    """nvidia-smi's total includes memory that the driver reserves for itself."""
    seen = torch.cuda.get_device_properties(0).total_memory
    assert seen <= driver_memory_bytes() <= 1.05 * seen


def test_what_is_planned_is_the_config_itself() -> None:
    sizes = describe(config(shards=2, dtype="bfloat16").served[0], MediaSize(64, 64))
    whole = describe(config(dtype="bfloat16").served[0], MediaSize(64, 64))
    assert len(sizes.denoise.ranks) == 2
    assert sum(rank.weights_bytes for rank in sizes.denoise.ranks) == (
        whole.denoise.ranks[0].weights_bytes + whole.denoisers[0].head_bytes
    )


def test_an_app_that_asks_for_more_cpus_than_there_are_is_refused_before_it_starts() -> None:
    told = "transformer.num_cpus is 64, but the largest node it may go to has 16 CPUs: lower num_cpus"
    with pytest.raises(ConfigError, match=told):
        build_app(config(num_cpus=64))


def test_files_that_are_not_whole_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """The files are checked because this machine is the whole cluster."""
    (tmp_path / "model_index.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    model = {"name": "t", "checkpoint": str(tmp_path), "family": "flux"}
    with pytest.raises(
        ConfigError, match=r"^ConfigError: model.checkpoint: .*model_index.json is a Git LFS pointer"
    ):
        build_app({"model": model})
