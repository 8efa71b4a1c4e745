"""Real models on real GPUs, from their published configs: known sizes, and valid placements."""

from itertools import product, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_balanced_memory

from cluster.machines.inventory import parse_gpus
from deployments.config.encoder import EncoderConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.engine.load import open_denoisers
from deployments.memory.config import MemoryConfig
from deployments.memory.stored import as_stored, stored_bytes
from deployments.plan.place import blocked_by_order, plan_placement
from deployments.plan.plan import StageConfigs, demands_of
from deployments.plan.propose import DoesNotFit, propose
from tests.deployments.plan.published import FOLDER, MODELS, model_config, sizes_of
from tests.thorough import usually

GIB = 2**30
ROOT = Path(__file__).parents[3]
TRANSFORMERS = {
    "flux": (22.17, 14.11, 11.09, 6.24),
    "qwen-image": (38.05, 19.05, 19.03, 10.71),
    "wan": (26.61, 13.53, 13.31, 7.49),
}
"""GiB in bf16, with fp8 storage, in int8 and nf4, computed from the layers' shapes without this code."""
OTHERS = {
    "flux": {"text_encoder": 0.23, "text_encoder_2": 9.12 - 32128 * 4096 * 2 / GIB, "vae": 0.16},
    "qwen-image": {"text_encoder": 15.45, "vae": 0.24},
    "wan": {"text_encoder": 12.54 - 256384 * 4096 * 2 / GIB, "vae": 0.24},
}
"""GiB in bf16. The published sizes of T5 and UMT5 count the tied token embeddings twice, which are held once."""
TECHNIQUES = (
    {},
    {"layerwise_casting": True},
    {"quantization": "int8"},
    {"quantization": "nf4"},
)
BF16 = StageConfigs(
    EncoderConfig(dtype="bfloat16"), TransformerConfig(dtype="bfloat16"), VaeConfig(dtype="bfloat16")
)


@pytest.mark.parametrize("name", usually(MODELS, "flux".__eq__))
def test_a_transformer_weighs_what_is_known_in_every_format(name: str) -> None:
    skeleton = open_denoisers(model_config(name), BF16.transformer).skeletons["transformer"]
    for technique, expected in zip(TECHNIQUES, TRANSFORMERS[name], strict=True):
        stored = as_stored(skeleton, MemoryConfig.model_validate({"dtype": "bfloat16", **technique}))
        assert stored_bytes(stored) / GIB == pytest.approx(expected, rel=0.015), technique


@pytest.mark.parametrize("name", usually(MODELS, "qwen-image".__ne__))
def test_encoders_and_vae_weigh_what_is_known(name: str) -> None:
    sizes = sizes_of(name)(BF16)
    parts = {part.name: part.weights_bytes / GIB for part in (*sizes.encode.components, *sizes.decode.components)}
    assert parts == pytest.approx(OTHERS[name], abs=0.01)


def proposed() -> list[list[str]]:
    """Returns the rows of the table in docs/planner.md: model, GPUs, format, R x S, fullest GPU, text encoders,
    VAE."""
    lines = (ROOT / "docs" / "planner.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "fullest GPU" in line) + 2
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), lines[start:])
    ]


NAMES = {"FLUX.1-dev": "flux", "Qwen-Image": "qwen-image", "Wan 2.1 14B": "wan"}


def test_the_docs_have_every_model_on_every_gpus() -> None:
    found = {(NAMES[row[0]], row[1]) for row in proposed()}
    assert found == set(product(MODELS, ("2x16GiB", "4x24GiB", "8x80GiB")))


@pytest.mark.parametrize(
    "row", usually(proposed(), lambda row: "FLUX" in row[0]), ids=lambda row: "-".join(row[:2])
)
def test_a_config_is_proposed_that_fits_as_the_docs_say(row: list[str]) -> None:
    name, gpus = NAMES[row[0]], parse_gpus(row[1])
    stages = propose(sizes_of(name), gpus)
    demands = demands_of(stages, sizes_of(name)(stages))
    placement = plan_placement(demands, gpus)
    transformer, limit_gib = stages.transformer, stages.encoder.vram_limit_gib
    fullest = max(placement.used_bytes(gpu) for gpu in gpus)
    assert row[2:] == [
        "bf16" if transformer.quantization is None else transformer.quantization.kind,
        f"{transformer.max_replicas} x {transformer.shards}",
        f"{fullest / GIB:.2f}",
        "whole" if limit_gib is None else f"streamed, {limit_gib:g} GiB",
        "whole" if stages.vae.tiling is None else "tiles",
    ]
    assert not placement.shortfalls()
    assert not placement.crowded_groups()
    assert blocked_by_order(demands, gpus) is None
    assert all(placement.used_bytes(gpu) <= gpu.memory_bytes for gpu in placement.gpus)


def test_what_cannot_fit_says_what_is_missing() -> None:
    with pytest.raises(DoesNotFit, match=r"not even in 4 bits.*denoise 0 rank 0 needs .* GiB too little"):
        propose(sizes_of("qwen-image"), parse_gpus("1x8GiB"))


@pytest.mark.parametrize("num_gpus", [2, 4])
@pytest.mark.parametrize("name", usually(MODELS, lambda name: name == "flux"))
def test_the_fullest_rank_holds_less_than_by_accelerates_automatic_map(name: str, num_gpus: int) -> None:
    """Every rank holds the embedders, a device map holds them once: at 2 GPUs this may be the whole difference."""
    sizes = sizes_of(name)(
        StageConfigs(BF16.encoder, TransformerConfig(dtype="bfloat16", shards=num_gpus), BF16.vae)
    )
    skeleton: Any = open_denoisers(model_config(name), BF16.transformer).skeletons["transformer"]
    whole = dict.fromkeys(range(num_gpus), 2**40)
    options = {"no_split_module_classes": skeleton._no_split_modules, "dtype": torch.bfloat16}
    device_map = infer_auto_device_map(skeleton, get_balanced_memory(skeleton, whole, **options), **options)
    part_bytes = compute_module_sizes(skeleton, dtype=torch.bfloat16)
    held = dict.fromkeys(set(device_map.values()), 0)
    for part, device in device_map.items():
        held[device] += part_bytes[part]
    fullest = max(rank.weights_bytes for rank in sizes.denoise.ranks)
    assert fullest <= max(held.values()) + sizes.denoisers[0].head_bytes
    if num_gpus == 4:
        assert fullest < 0.98 * max(held.values())


def test_published_configs_need_no_weights() -> None:
    assert not [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".json"]
