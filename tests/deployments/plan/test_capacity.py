"""What an app lacks on the available GPUs, found before it starts."""

import re
from dataclasses import replace
from typing import Any

import pytest

from cluster.machines.inventory import Gpu, parse_gpus
from deployments.config.encoder import EncoderConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.plan.capacity import find_shortage
from deployments.plan.plan import StageConfigs
from deployments.plan.sizes import DenoiserSizes, ModelSizes, RankSizes, StageSizes
from deployments.request import MediaSize

GIB = 2**30
NAMES_ONLY = (Gpu(0, 0, 0), Gpu(0, 1, 0))
FLUX = ModelSizes(
    *(
        StageSizes((), (RankSizes(int(weights * GIB), int(weights * GIB), GIB // 2),))
        for weights in (9.1, 22.17, 0.16)
    ),
    denoisers=(DenoiserSizes("transformer", (), 0, 0),),
    batch_size=1,
    sizes=(MediaSize(1024, 1024),),
)
"""Sizes of FLUX.1-dev in bf16."""
TWICE_FLUX = replace(FLUX, denoise=StageSizes((), (RankSizes(40 * GIB, 40 * GIB, GIB // 2),)))


def stages(encoder: float = 0, vae: float = 0, **transformer: Any) -> StageConfigs:
    return StageConfigs(
        EncoderConfig(num_gpus=encoder, dtype="bfloat16"),
        TransformerConfig(dtype="bfloat16", **transformer),
        VaeConfig(num_gpus=vae, dtype="bfloat16"),
    )


def test_a_group_that_finds_no_gpus_is_told_with_what_there_is() -> None:
    [sentence] = find_shortage(stages(num_gpus=0.79, shards=3), None, NAMES_ONLY).surely
    assert "denoise 3 x 0.79 GPU" in sentence
    assert "2 GPUs on node 0" in sentence


def test_one_replica_that_fits_is_enough_to_start() -> None:
    shortage = find_shortage(stages(num_gpus=1, min_replicas=3, max_replicas=4), None, NAMES_ONLY)
    assert not shortage.surely
    assert shortage.perhaps == ("no room for denoise 2: 2 GPUs on node 0",)


@pytest.mark.parametrize("settings", [{"num_gpus": 0.5, "shards": 3}, {"num_gpus": 0}])
def test_what_fits_lacks_nothing(settings: dict[str, Any]) -> None:
    shortage = find_shortage(stages(encoder=0.25, **settings), None, NAMES_ONLY)
    assert not shortage.surely
    assert not shortage.perhaps


def test_a_stage_that_chooses_its_nodes_is_left_to_ray() -> None:
    assert not find_shortage(stages(num_gpus=4, accelerator_type="H100"), None, NAMES_ONLY).surely


def test_weights_that_exceed_a_gpu_are_told_in_gib() -> None:
    [sentence] = find_shortage(stages(num_gpus=1), FLUX, (Gpu(0, 0, 16 * GIB),)).surely
    assert "node 0 GPU 0 has 16.00 GiB: 6.17 GiB too little for the weights of denoise 0 rank 0" in sentence


def test_what_is_only_close_is_a_warning() -> None:
    """The weights take 22.17 of 22.5 GiB; the sizes of working memory and of CUDA itself are estimates."""
    shortage = find_shortage(stages(num_gpus=1), FLUX, (Gpu(0, 0, int(22.5 * GIB)),))
    assert not shortage.surely
    assert any("too little" in sentence for sentence in shortage.perhaps)


def test_weights_that_exceed_their_share_of_a_gpu_are_told_with_a_share_that_suffices() -> None:
    """Loading would exceed torch's cap; with the share that the message names it does not."""
    [sentence] = find_shortage(stages(encoder=0.12, num_gpus=0.5), FLUX, parse_gpus("1x80GiB")).surely
    named = re.search(r"encode 0 may fill .* 9.10 GiB of weights: give it num_gpus ([\d.]+)", sentence)
    assert named is not None
    shortage = find_shortage(stages(encoder=float(named[1]), num_gpus=0.5), FLUX, parse_gpus("1x80GiB"))
    assert (shortage.surely, shortage.perhaps) == ((), ())


@pytest.mark.parametrize("gpus", ["1x(2x24GiB)+1x80GiB", "1x80GiB+1x(2x24GiB)"])
def test_only_ray_knows_which_of_several_sizes_it_will_choose(gpus: str) -> None:
    shortage = find_shortage(stages(num_gpus=1), TWICE_FLUX, parse_gpus(gpus))
    assert not shortage.surely
    assert bool(shortage.perhaps) == gpus.startswith("1x(2x24")


def test_by_accelerates_map_weights_may_leave_the_gpu() -> None:
    assert not find_shortage(stages(num_gpus=1, device_map="auto"), FLUX, parse_gpus("1x16GiB")).surely
