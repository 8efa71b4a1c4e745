"""Real models on real GPUs, from their published configs: sizes that are known, placements that hold."""

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_balanced_memory

from cluster.inventory import parse_gpus
from deployments.config import EncoderConfig, TransformerConfig, VaeConfig
from deployments.engine.load import open_denoiser
from deployments.families import FAMILIES
from deployments.memory.config import MemoryConfig
from deployments.memory.stored import as_stored, stored_bytes
from deployments.plan.place import blocked_by_order, place
from deployments.plan.plan import Stages, demands_of
from deployments.plan.propose import DoesNotFit, propose
from tests.deployments.plan.published import FOLDER, MODELS, model_config, sizes_of

GIB = 2**30
TRANSFORMERS = {
    "flux": (22.17, 14.11, 11.09, 6.24),
    "qwen-image": (38.05, 19.05, 19.03, 10.71),
    "wan": (26.61, 13.53, 13.31, 7.49),
}
"""GiB in bf16, with fp8 storage, in int8 and nf4, computed apart from this code from the layers' shapes."""
OTHERS = {
    "flux": {"text_encoder": 0.23, "text_encoder_2": 9.12 - 32128 * 4096 * 2 / GIB, "vae": 0.16},
    "qwen-image": {"text_encoder": 15.45, "vae": 0.24},
    "wan": {"text_encoder": 12.54 - 256384 * 4096 * 2 / GIB, "vae": 0.24},
}
"""GiB in bf16. Of T5 and UMT5 the figures count the tied token embeddings twice, which are held once."""
TECHNIQUES = (
    {},
    {"layerwise_casting": True},
    {"quantization": "int8"},
    {"quantization": "nf4"},
)
BF16 = Stages(EncoderConfig(dtype="bfloat16"), TransformerConfig(dtype="bfloat16"), VaeConfig(dtype="bfloat16"))


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_weighs_what_is_known_in_every_format(name: str) -> None:
    denoiser = open_denoiser(model_config(name), FAMILIES[MODELS[name].family], BF16.transformer)
    for technique, expected in zip(TECHNIQUES, TRANSFORMERS[name], strict=True):
        stored = as_stored(denoiser.skeleton, MemoryConfig.model_validate({"dtype": "bfloat16", **technique}))
        assert stored_bytes(stored) / GIB == pytest.approx(expected, rel=0.015), technique


@pytest.mark.parametrize("name", MODELS)
def test_encoders_and_vae_weigh_what_is_known(name: str) -> None:
    sizes = sizes_of(name)(BF16)
    parts = {part.name: part.weights_bytes / GIB for part in (*sizes.encode.components, *sizes.decode.components)}
    assert parts == pytest.approx(OTHERS[name], abs=0.01)


PROPOSED = {
    ("flux", "2x16GiB"): (None, 2, 1),
    ("flux", "4x24GiB"): (None, 1, 3),
    ("flux", "8x80GiB"): (None, 1, 8),
    ("qwen-image", "2x16GiB"): ("int8", 2, 1),
    ("qwen-image", "4x24GiB"): (None, 3, 1),
    ("qwen-image", "8x80GiB"): (None, 1, 8),
    ("wan", "2x16GiB"): ("int8", 2, 1),
    ("wan", "4x24GiB"): (None, 3, 1),
    ("wan", "8x80GiB"): (None, 1, 8),
}
"""Format, shards and replicas of the transformer."""


@pytest.mark.parametrize(("name", "gpus"), PROPOSED)
def test_a_config_is_proposed_that_fits(name: str, gpus: str) -> None:
    stages = propose(sizes_of(name), parse_gpus(gpus))
    transformer = stages.transformer
    kind = None if transformer.quantization is None else transformer.quantization.kind
    assert (kind, transformer.shards, transformer.max_replicas) == PROPOSED[name, gpus]
    demands = demands_of(stages, sizes_of(name)(stages))
    placement = place(demands, parse_gpus(gpus))
    assert not placement.shortfalls()
    assert not placement.crowded_groups()
    assert blocked_by_order(demands, parse_gpus(gpus)) is None
    assert all(placement.used_bytes(gpu) <= gpu.memory_bytes for gpu in placement.gpus)


def test_what_cannot_fit_says_what_is_missing() -> None:
    with pytest.raises(DoesNotFit, match=r"not even in 4 bits.*denoise 0 rank 0 needs .* GiB too little"):
        propose(sizes_of("qwen-image"), parse_gpus("1x8GiB"))


@pytest.mark.parametrize("num_gpus", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_fullest_rank_holds_less_than_by_accelerates_automatic_map(name: str, num_gpus: int) -> None:
    """Every rank has the embedders, a device map has them once: at 2 GPUs that may be the whole difference."""
    sizes = sizes_of(name)(Stages(BF16.encoder, TransformerConfig(dtype="bfloat16", shards=num_gpus), BF16.vae))
    skeleton = open_denoiser(model_config(name), FAMILIES[MODELS[name].family], BF16.transformer).skeleton
    whole = dict.fromkeys(range(num_gpus), 2**40)
    options = {"no_split_module_classes": skeleton._no_split_modules, "dtype": torch.bfloat16}
    device_map = infer_auto_device_map(skeleton, get_balanced_memory(skeleton, whole, **options), **options)
    part_bytes = compute_module_sizes(skeleton, dtype=torch.bfloat16)
    held = dict.fromkeys(set(device_map.values()), 0)
    for part, device in device_map.items():
        held[device] += part_bytes[part]
    fullest = max(rank.weights_bytes for rank in sizes.denoise.ranks)
    assert fullest <= max(held.values()) + sizes.head_bytes
    if num_gpus == 4:
        assert fullest < 0.98 * max(held.values())


def test_published_configs_need_no_weights() -> None:
    assert not [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".json"]
