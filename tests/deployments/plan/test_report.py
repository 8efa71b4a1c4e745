"""A plan as text, JSON and image."""

import io
import json
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from cluster.machines.inventory import parse_gpus
from deployments.config.encoder import EncoderConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.plan.advice import Admitted
from deployments.plan.picture import draw_placement
from deployments.plan.plan import Plan, StageConfigs, plan
from deployments.plan.profile import DenoiserTimes, Profile, Times
from deployments.plan.rate import seconds_of
from deployments.plan.report import plan_as_json, print_plan
from deployments.plan.sizes import BlockSizes, ComponentSizes, DenoiserSizes, ModelSizes, RankSizes, StageSizes
from deployments.request import MediaSize

GIB = 2**30
BLOCKS = tuple(BlockSizes(f"transformer_blocks.{i}", 9 * GIB // 2) for i in range(4))
SIZES = ModelSizes(
    encode=StageSizes((ComponentSizes("text_encoder", "T5", 10**9, 2 * GIB),), (RankSizes(2 * GIB, 2 * GIB, 0),)),
    denoise=StageSizes(
        (ComponentSizes("transformer", "Flux", 9 * 10**9, 18 * GIB),),
        (RankSizes(9 * GIB, 9 * GIB, GIB, ((0, 2),)), RankSizes(9 * GIB, 9 * GIB, GIB, ((2, 4),))),
    ),
    decode=StageSizes((ComponentSizes("vae", "KL", 10**8, GIB // 8),), (RankSizes(GIB // 8, GIB // 8, GIB),)),
    denoisers=(DenoiserSizes("transformer", BLOCKS, 0, 0),),
    batch_size=1,
    sizes=(MediaSize(1024, 1024),),
)
TWO_SHARDS = StageConfigs(
    EncoderConfig(num_gpus=0.18, dtype="bfloat16", max_replicas=1),
    TransformerConfig(num_gpus=0.69, dtype="bfloat16", shards=2, max_replicas=1),
    VaeConfig(num_gpus=0.12, dtype="bfloat16", max_replicas=1),
)


def planned(gpus: str, stages: StageConfigs = TWO_SHARDS, sizes: ModelSizes = SIZES, **options: object) -> Plan:
    return plan(
        "a model", stages, sizes, parse_gpus(gpus), **{"admitted": Admitted(256, 1024 * 1024, 1)} | options
    )


def build_times(*blocks_s: float, **others: Any) -> Times:
    denoiser = DenoiserTimes(head_s=0, blocks_s=blocks_s, tail_s=0, num_forwards=10)
    return Times(encode_s=0.1, denoisers={"transformer": denoiser}, decode_s=0.1, **others)


def text_of(plan: Plan) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=130))
    return out.getvalue()


def test_the_text_tells_bytes_cut_place_and_that_it_fits() -> None:
    text = text_of(planned("2x16GiB"))
    assert "4 x transformer_blocks 4.50 GiB" in text
    assert [line for line in text.splitlines() if "denoise 0 rank 1" in line and "2:4" in line and "GPU 1" in line]
    assert "it fits" in text
    assert "throughput: unknown without times" in text


def test_what_does_not_fit_is_told_in_text_json_and_picture() -> None:
    plan = planned("2x12GiB")
    assert "does not fit: denoise 0 rank 0 needs 10.75 GiB on node 0 GPU 0" in text_of(plan)
    assert plan_as_json(plan)["fits"] is False
    assert "does not fit" in draw_placement(plan)


def test_with_times_it_tells_throughput_and_use() -> None:
    times = build_times(0.1, 0.1, 0.1, 0.1)
    plan = planned("2x16GiB", profile=Profile({}, "x", {"1024x1024": times}))
    assert "throughput: at most 0.455 a second" in text_of(plan)  # rank 0 and both small stages share a GPU
    assert plan_as_json(plan)["gpus"][0]["use"] == pytest.approx(1)


def test_measured_working_memory_replaces_what_was_told() -> None:
    times = build_times(*(0.1,) * 4, working_bytes={"encode": 1, "denoise": 2, "decode": 3})
    plan = planned("2x16GiB", profile=Profile({}, "x", {"1024x1024": times}))
    assert [process.sizes.working_bytes for process in plan.placement.processes] == [1, 2, 2, 3]


def test_the_json_holds_every_block_and_process() -> None:
    found = json.loads(json.dumps(plan_as_json(planned("2x16GiB"))))
    assert found["denoisers"]["transformer"]["blocks_bytes"] == {
        f"transformer_blocks.{i}": 9 * GIB // 2 for i in range(4)
    }
    assert [process["gpus"] for process in found["processes"]] == [[[0, 0]], [[0, 0]], [[0, 1]], [[0, 0]]]


def test_the_picture_is_the_same_each_time_and_has_every_process() -> None:
    picture = draw_placement(planned("2x16GiB"))
    assert picture == draw_placement(planned("2x16GiB"))
    texts = [text.text or "" for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    for process in ("encode 0", "denoise 0 rank 0: 0-1", "denoise 0 rank 1: 2-3", "decode 0"):
        assert any(text.startswith(process) for text in texts), process


@pytest.mark.parametrize("max_replicas", [2, 3])
def test_it_tells_where_ray_would_send_a_further_replica_to_wait(max_replicas: int) -> None:
    """Two GPUs that each have a third left have no room for two thirds."""
    whole = TransformerConfig(num_gpus=0.66, dtype="bfloat16", max_replicas=max_replicas, min_replicas=2)
    small = dict.fromkeys(("encode", "decode"), StageSizes((), (RankSizes(0, 0, 0),)))
    denoise = StageSizes((), (RankSizes(9 * GIB, 9 * GIB, GIB // 4),))
    sizes = replace(SIZES, denoise=denoise, **small)
    stages = StageConfigs(EncoderConfig(dtype="bfloat16"), whole, VaeConfig(dtype="bfloat16"))
    advice = " ".join(planned("1x(2x16GiB)", stages, sizes).advice)
    assert ("on node 0, whose GPUs have 0.68 left in all" in advice) == (max_replicas == 3)


@pytest.mark.parametrize(
    ("gpus", "stages", "sizes", "advice"),
    [
        ("2x80GiB", {}, {}, "shards do not make a request faster"),
        ("2x16GiB", {}, {"denoisers": (DenoiserSizes("unet", BLOCKS, 0, 0),)}, "a UNet in 2 shards"),
        ("3x16GiB", {}, {}, "nothing is placed on node 0 GPU 2"),
        ("2x(1x16GiB)", {}, {}, "are on several nodes"),
        ("2x16GiB", {"max_ongoing_requests": 3}, {}, "2 shards need 4 requests to stay busy; at most 3"),
        ("2x16GiB", {"dtype": "float32"}, {}, "transformer.dtype is float32"),
        ("4x16GiB", {"num_gpus": 2}, {}, "transformer.num_gpus 2 without device_map uses one GPU only"),
    ],
)
def test_it_advises_against(gpus: str, stages: dict[str, object], sizes: dict[str, object], advice: str) -> None:
    transformer = TransformerConfig.model_validate(TWO_SHARDS.transformer.model_dump() | stages)
    plan = planned(gpus, replace(TWO_SHARDS, transformer=transformer), replace(SIZES, **sizes))
    assert any(advice in line for line in plan.advice), plan.advice


SHARED = TransformerConfig(num_gpus=0.69, dtype="bfloat16", context_parallel=2)


def planned_shared(gpus: str, weights_bytes: int = 18 * GIB, size: int = 1024, **settings: int) -> Plan:
    """Returns a plan of ranks that share each forward, with a class that diffusers has a plan for."""
    transformer = SHARED.model_copy(update={"context_parallel": 1, **settings} if settings else {})
    [part] = SIZES.denoise.components
    held = weights_bytes // transformer.tensor_parallel
    rank = RankSizes(held, held, GIB, ((0, 4),), degree=transformer.parallel_degree)
    denoise = StageSizes((replace(part, class_name="FluxTransformer2DModel"),), (rank,) * transformer.num_ranks)
    sizes = replace(SIZES, denoise=denoise, sizes=(MediaSize(size, size),))
    stages = replace(TWO_SHARDS, transformer=transformer)
    return planned(gpus, stages, sizes, admitted=Admitted(256, size * size, 1))


def test_ranks_that_share_each_forward_are_for_latency_and_replicas_for_throughput() -> None:
    advice = " ".join(planned_shared("2x32GiB").advice)
    assert "2 ranks share each forward although" in advice
    assert "for throughput rather use 2 replicas" in advice


def test_where_replicas_could_share_their_forwards_it_is_told_which_is_for_what() -> None:
    advice = " ".join(planned_shared("2x32GiB", context_parallel=1, min_replicas=2, max_replicas=2).advice)
    assert "2 replicas raise throughput; for latency use fewer, each with context_parallel ranks" in advice


@pytest.mark.parametrize(("size", "is_told"), [(1024, True), (2048, False)])
def test_many_tensor_parallel_ranks_are_advised_against_where_pictures_are_small(size: int, is_told: bool) -> None:
    advice = " ".join(planned_shared("4x16GiB", tensor_parallel=4, size=size).advice)
    assert ("tensor_parallel: 2, and use more shards" in advice) == is_told


def test_where_weights_fit_one_gpu_context_parallel_is_advised_instead_of_tensor_parallel() -> None:
    assert "context_parallel exchanges less" in " ".join(planned_shared("2x32GiB", tensor_parallel=2).advice)
    assert "context_parallel exchanges less" not in " ".join(planned_shared("2x16GiB", tensor_parallel=2).advice)


def test_ranks_that_share_each_forward_over_several_nodes_are_told() -> None:
    assert "every block waits for the network" in " ".join(planned_shared("2x(1x32GiB)").advice)


def test_forwards_that_two_ranks_share_take_half_the_time_at_best() -> None:
    one, two = (planned_shared("2x32GiB", context_parallel=degree).placement.processes for degree in (1, 2))
    times = build_times(0.1, 0.1, 0.1, 0.1)
    alone, shared = (seconds_of(next(p for p in of if p.stage == "denoise"), times) for of in (one, two))
    assert shared == pytest.approx(alone / 2)


def test_a_plan_without_fault_is_advised_nothing() -> None:
    assert planned("2x16GiB").advice == ()


def test_more_shards_than_requests_are_advised_against() -> None:
    advice = planned("2x16GiB", admitted=Admitted(1, 1024 * 1024, 1)).advice
    assert any("2 shards and at most 1 requests" in line for line in advice)


def test_requests_beyond_the_plan_are_told() -> None:
    [advice] = planned("2x16GiB", admitted=Admitted(256, 2048 * 2048, 1)).advice
    assert advice.startswith("requests of up to 4194304 pixels are admitted, but this plan is for 1024x1024")


def test_uneven_times_are_worth_other_cuts() -> None:
    times = build_times(0.4, 0.1, 0.1, 0.1)
    plan = planned("2x16GiB", profile=Profile({}, "x", {"1024x1024": times}))
    assert "cuts: [1] make the slowest shard 25% faster" in " ".join(plan.advice)
