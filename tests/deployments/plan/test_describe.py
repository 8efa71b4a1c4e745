"""The planned weights equal those that processes hold."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deployments.checkpoints.components import Stage, fetch_stage, stage_components
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.engine.load import load_rank, open_denoisers
from deployments.families import FAMILIES
from deployments.memory.working import on_meta, working_bytes
from deployments.options.adapter import AdapterConfig
from deployments.plan.describe import Description
from deployments.plan.sizes import STAGES, ModelSizes
from deployments.request import MediaSize
from deployments.stages.pipeline import load_pipeline, loaded_models
from serve_app.bench.models import bench_model
from tests.thorough import usually
from tests.tiny_models import EXPERTS, tiny_model


def described(model: ModelConfig, size: int = 64, **transformer: Any) -> ModelSizes:
    media = MediaSize(size, size, 5 if model.architecture.media == "video" else 1)
    return Description(model).sizes(
        EncoderConfig(max_sequence_length=64), TransformerConfig(**transformer), VaeConfig(), (media,)
    )


def held_by_ranks(model: ModelConfig, config: TransformerConfig) -> list[int]:
    """Returns the bytes of weights that every rank reports."""
    denoisers = open_denoisers(model, config)
    ranks = [load_rank(denoisers, model, config, rank) for rank in range(config.num_ranks)]
    return [sum(rank.residency.stats().weights_bytes.values()) for rank in ranks]


def held_by_stage(model: ModelConfig, stage: Stage, config: StageConfig) -> int:
    folder, index = fetch_stage(model, stage, "float32")
    parts = stage_components(index, model.architecture, stage)
    models = loaded_models(load_pipeline(folder, index, parts, config, variant=None)).values()
    tensors = {value.data_ptr(): value.nbytes for model in models for value in model.state_dict().values()}
    return sum(tensors.values())


@pytest.mark.parametrize("name", usually([*FAMILIES, EXPERTS], {"flux", "sd15", EXPERTS}.__contains__))
def test_every_process_holds_what_was_planned(name: str) -> None:
    model = tiny_model(name)
    planned = described(model, shards=2)
    held = held_by_ranks(model, TransformerConfig(shards=2))
    assert [rank.weights_bytes for rank in planned.denoise.ranks] == held
    assert planned.encode.ranks[0].weights_bytes == held_by_stage(model, "encode", EncoderConfig())
    assert planned.decode.ranks[0].weights_bytes == held_by_stage(model, "decode", VaeConfig())


def test_a_larger_model_holds_what_was_planned(tmp_path: Path) -> None:
    model = bench_model("100M", tmp_path)
    planned = described(model, shards=3, dtype="bfloat16")
    held = held_by_ranks(model, TransformerConfig(shards=3, dtype="bfloat16"))
    assert [rank.weights_bytes for rank in planned.denoise.ranks] == pytest.approx(held, rel=0.03)


def test_what_is_kept_of_adapters_is_counted_where_there_are_some_for_the_stage() -> None:
    adapters = {"a": AdapterConfig(source="/a.safetensors")}
    kept, bare = (
        Description(tiny_model("sdxl").model_copy(update=update)).sizes(
            EncoderConfig(adapter_cache_mib=2), TransformerConfig(), VaeConfig(), (MediaSize(64, 64),)
        )
        for update in ({"adapters": adapters}, {})
    )
    more = [
        sum(rank.need_bytes for rank in kept.stage(stage).ranks)
        - sum(rank.need_bytes for rank in bare.stage(stage).ranks)
        for stage in STAGES
    ]
    assert more == [2 * 2**20, 1024 * 2**20, 0]
    textless = described(tiny_model("wan").model_copy(update={"adapters": adapters}))
    assert textless.encode.ranks[0].adapter_bytes == 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_text_encoders_hold_what_was_planned(kind: str) -> None:
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    encoder = EncoderConfig(dtype="bfloat16", quantization=kind, max_sequence_length=64)
    sizes = Description(model).sizes(encoder, TransformerConfig(), VaeConfig(), (MediaSize(64, 64),))
    held = held_by_stage(model, "encode", encoder)
    assert sizes.encode.ranks[0].weights_bytes == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "degree"), [({"context_parallel": 2}, 2), ({"tensor_parallel": 2, "shards": 2}, 2)], ids=str
)
def test_every_rank_that_shares_forwards_is_planned_next_to_the_others(
    settings: dict[str, int], degree: int
) -> None:
    whole, shared = described(tiny_model("flux")), described(tiny_model("flux"), **settings)
    ranks = shared.denoise.ranks
    assert ranks[::degree] == ranks[1::degree]
    held, total = sum(rank.weights_bytes for rank in ranks), whole.denoise.ranks[0].weights_bytes
    if "context_parallel" in settings:
        assert held == 2 * total
        assert ranks[0].working_bytes < whole.denoise.ranks[0].working_bytes
    else:
        assert total < held < 2 * total


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("sd15", {"context_parallel": 2}, "how ranks share a forward of UNet2DConditionModel"),
        ("wan", {"tensor_parallel": 2}, "how ranks share a forward of WanTransformer3DModel"),
        (
            "flux",
            {"context_parallel": 5},
            "attention heads (num_attention_heads), which 5 ranks cannot share evenly",
        ),
    ],
)
def test_what_ranks_cannot_share_is_not_planned(name: str, settings: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        described(tiny_model(name), **settings)


def test_larger_pictures_and_merged_forwards_need_more_working_memory() -> None:
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    description = Description(model)

    def working(size: int, max_batch_size: int) -> int:
        transformer = TransformerConfig(max_batch_size=max_batch_size)
        sizes = description.sizes(EncoderConfig(), transformer, VaeConfig(), (MediaSize(size, size),))
        assert sizes.batch_size == max_batch_size
        return sizes.denoise.ranks[0].working_bytes

    small, large, merged = working(64, 1), working(512, 1), working(64, 4)
    assert large > 2 * small
    assert merged == pytest.approx(4 * small, rel=0.1)


def test_a_budget_or_offloading_leaves_less_on_the_device() -> None:
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    description = Description(model)

    def on_device(**transformer: Any) -> list[int]:
        sizes = description.sizes(
            EncoderConfig(), TransformerConfig(shards=2, **transformer), VaeConfig(), (MediaSize(64, 64),)
        )
        return [rank.device_bytes for rank in sizes.denoise.ranks]

    whole, limited = on_device(), on_device(vram_limit_gib=2**-9)
    layers, blocks = on_device(offload="group"), on_device(offload={"kind": "group", "level": "block"})
    assert limited == [2**21, 2**21]
    for rank in range(2):
        assert layers[rank] < blocks[rank] < whole[rank]


def test_two_denoisers_take_what_each_takes_and_the_larger_forward() -> None:
    one, both = described(tiny_model("wan22-5b")), described(tiny_model(EXPERTS), shards=2)
    assert [of.name for of in one.denoisers] == ["transformer"]
    assert [of.name for of in both.denoisers] == ["transformer", "transformer_2"]
    first, second = both.denoisers
    assert replace(second, name=first.name) == first
    assert [rank.blocks for rank in both.denoise.ranks] == [((0, 2),) * 2, ((2, 3),) * 2]
    assert sum(rank.weights_bytes for rank in both.denoise.ranks) == 2 * (first.weights_bytes + first.head_bytes)


def test_two_denoisers_by_turns_are_one_at_a_time_on_the_device() -> None:
    resident, offloaded = (described(tiny_model(EXPERTS), **way) for way in ({}, {"offload": "model"}))
    assert resident.denoise.ranks[0].device_bytes == 2 * offloaded.denoise.ranks[0].device_bytes


def test_working_memory_is_what_lives_at_once() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(5))).to("meta")
    tokens = torch.empty(10, 256, device="meta")
    assert working_bytes(model, lambda: model(tokens)) == 2 * tokens.nbytes


def test_repeated_operations_on_other_layouts_and_dtypes_are_told_apart() -> None:
    grid = torch.empty(8, 4, dtype=torch.float32, device="meta")
    with on_meta():
        scaled = [tensor * 2 for tensor in (grid, grid, grid.t(), grid.half())]
    assert [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in scaled] == [
        ((8, 4), (4, 1), torch.float32),
        ((8, 4), (4, 1), torch.float32),
        ((4, 8), (1, 4), torch.float32),
        ((8, 4), (4, 1), torch.float16),
    ]


def test_equal_numbers_of_different_types_are_told_apart() -> None:
    counts = torch.empty(4, dtype=torch.int64, device="meta")
    with on_meta():
        assert [(counts * factor).dtype for factor in (2, 2.0, 2)] == [torch.int64, torch.float32, torch.int64]


def test_attention_keeps_no_scores() -> None:
    query = torch.empty(1, 2, 512, 16, device="meta")
    attend = torch.nn.functional.scaled_dot_product_attention
    assert working_bytes(nn.Identity(), lambda: attend(query, query, value=query)) == query.nbytes
