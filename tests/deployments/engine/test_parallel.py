"""Forwards that two ranks share compute what the whole model computes in plain diffusers."""

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._pytree import tree_leaves

from cluster.ranks.parallel_group import ParallelGroup
from cluster.ranks.store_address import StoreAddress
from cluster.ranks.transport import PeerLost, join_store, open_store
from deployments.checkpoints.source import fetch_checkpoint
from deployments.engine.blocks import block_names
from deployments.engine.parallel import Parallel
from deployments.engine.shard import load_shard
from deployments.families.parallel import CONTEXT_PARALLEL, TENSOR_PARALLEL, find_parallel_faults
from tests.deployments.rank_processes import RankProcesses
from tests.deployments.recorded import record

CPU = torch.device("cpu")
QUICK = ("flux", "wan")
THOROUGH = (
    "qwen-image",
    "flux-kontext",
    "flux-fill",
    "flux2",
    "flux2-klein",
    "qwen-image-edit-plus",
    "wan21-i2v",
    "wan22-5b",
)
ODD = {"height": 48, "width": 80}
"""An image of this size has 15 tokens, which two ranks cannot split evenly."""

_kept: dict[str, Any] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shared" in metafunc.fixturenames:
        names = QUICK + (THOROUGH if metafunc.config.getoption("--thorough") else ())
        metafunc.parametrize("shared", names)


@pytest.fixture(scope="module")
def two() -> Iterator[RankProcesses]:
    ranks = RankProcesses(2)
    point = ranks.ask(0, _open).result()
    ranks.ask_all(_meet, [(rank, point) for rank in range(2)])
    yield ranks
    ranks.end()


@pytest.mark.parametrize("splits_weights", [False, True], ids=["context", "tensor"])
def test_two_ranks_predict_what_the_whole_model_does(
    two: RankProcesses, shared: str, splits_weights: bool
) -> None:
    """Tests the whole model, and the model cut in two shards, which both ranks hold one after the other."""
    forwards = {forward.layout: forward for forward in record(shared)}.values()
    classes = TENSOR_PARALLEL if splits_weights else CONTEXT_PARALLEL
    if any(type(forward.model).__name__ not in classes for forward in forwards):
        pytest.skip("diffusers has no plan")
    for forward in forwards:
        num_blocks = len(block_names(forward.model))
        for blocks in (None, ((0, 1), (1, num_blocks)), ((0, num_blocks - 1), (num_blocks - 1, num_blocks))):
            check(two, shared, forward, blocks, splits_weights)


@pytest.mark.parametrize("name", ["flux", "qwen-image", "wan"])
def test_what_does_not_split_evenly_is_split_all_the_same(two: RankProcesses, name: str) -> None:
    forward = record(name, prompt="a red fox in the snow", **ODD)[0]
    num_blocks = len(block_names(forward.model))
    for blocks in (None, ((0, 1), (1, num_blocks))):
        check(two, name, forward, blocks, False)


def check(two: RankProcesses, name: str, forward: Any, blocks: Any, splits_weights: bool) -> None:
    of = type(forward.model).__name__, name, forward.component, blocks, splits_weights, forward.inputs
    for predictions in two.ask_all(_predict, [of] * 2):
        got, wanted = tree_leaves(predictions), tree_leaves(forward.output)
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_what_one_rank_fails_at_fails_on_both(two: RankProcesses) -> None:
    """After the failure both ranks continue."""
    failed = two.ask_all(_agree, [(7, None), (7, MemoryError("full"))])
    assert [repr(error) for error in failed] == ["MemoryError('full')"] * 2
    assert two.ask_all(_agree, [(8, None), (8, None)]) == [None, None]


def test_ranks_that_are_at_different_micro_batches_are_lost(two: RankProcesses) -> None:
    lost = two.ask_all(_agree, [(1, None), (2, None)])
    assert all(isinstance(error, PeerLost) and "different micro-batches: [1, 2]" in str(error) for error in lost)


def test_who_failed_while_the_other_says_nothing_is_lost(two: RankProcesses) -> None:
    """This happens when the other rank waits in a collective. Its later answer is discarded."""
    lost = two.ask(0, _agree, 9, ValueError("mine")).result()
    assert isinstance(lost, PeerLost)
    assert "this one failed: ValueError('mine')" in str(lost)


@pytest.mark.parametrize(
    ("classes", "plan"), [(CONTEXT_PARALLEL, "_cp_plan"), (TENSOR_PARALLEL, "_tp_plan")], ids=["context", "tensor"]
)
def test_every_class_that_is_let_in_has_a_plan(classes: tuple[str, ...], plan: str) -> None:
    assert all(getattr(getattr(diffusers, name), plan) for name in classes)


@pytest.mark.parametrize(
    ("class_name", "degrees", "told"),
    [
        ("UNet2DConditionModel", (2, 1), "only of Flux2Transformer2DModel, FluxTransformer2DModel, Qwen"),
        (
            "WanTransformer3DModel",
            (1, 2),
            "transformer.tensor_parallel: it is not known how ranks share a forward of Wan",
        ),
        ("FluxTransformer2DModel", (5, 1), "24 attention heads (num_attention_heads), which 5 ranks cannot share"),
        ("FluxTransformer2DModel", (1, 7), "cannot share evenly: set it to one of 2, 3, 4, 6, 8, 12, 24"),
    ],
)
def test_what_cannot_be_shared_is_told_with_what_can(class_name: str, degrees: tuple[int, int], told: str) -> None:
    [fault] = find_parallel_faults(class_name, {"num_attention_heads": 24}, *degrees)
    assert told in fault
    assert not list(find_parallel_faults(class_name, {"num_attention_heads": 24}, 1, 1))


def _open() -> StoreAddress:
    _kept["store"] = open_store("127.0.0.1", 2)
    return StoreAddress("127.0.0.1", _kept["store"].port)


def _meet(rank: int, point: StoreAddress) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = _kept.get("store") or join_store(point.host, point.port, 2)
    group = ParallelGroup(rank, 2, store, name="two", device=CPU, silent_after_s=1)
    _kept["group"] = group
    for splits_weights in (False, True):
        _kept[f"parallel {splits_weights}"] = Parallel(group, CPU, splits_weights=splits_weights)


def _agree(batch_id: int, error: Exception | None) -> BaseException | None:
    try:
        found: BaseException | None = _kept["group"].agree(batch_id, error)
    except PeerLost as lost:
        return PeerLost(str(lost))
    return found


def _predict(
    class_name: str, name: str, component: str, blocks: Any, splits_weights: bool, inputs: dict[str, Any]
) -> Any:
    parallel = _kept[f"parallel {splits_weights}"]
    folder = fetch_checkpoint(f"tiny://{name}", ())
    load = partial(load_shard, getattr(diffusers, class_name), folder, component, dtype=torch.float32)
    result = None
    for own in blocks or (None,):
        shard = load(blocks=own, parallel=parallel)
        with torch.inference_mode():
            result = shard.run(inputs, result)
    return tuple(part.clone() for part in tree_leaves(result))
