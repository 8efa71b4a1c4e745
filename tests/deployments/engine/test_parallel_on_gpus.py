"""Forwards that two GPUs share, over NCCL."""

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from cluster.ranks.parallel_group import ParallelGroup
from cluster.ranks.store_address import StoreAddress
from cluster.ranks.transport import join_store, open_store
from deployments.checkpoints.source import fetch_checkpoint
from deployments.engine.parallel import Parallel
from deployments.engine.shard import load_shard
from tests.deployments.rank_processes import RankProcesses
from tests.deployments.recorded import record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or not torch.distributed.is_nccl_available(),
        reason="needs two GPUs and NCCL",
    ),
]
_kept: dict[str, Any] = {}


@pytest.fixture(scope="module")
def two() -> Iterator[RankProcesses]:
    ranks = RankProcesses(2)
    point = ranks.ask(0, _open).result()
    ranks.ask_all(_meet, [(rank, point) for rank in range(2)])
    yield ranks
    ranks.end()


@pytest.mark.parametrize("splits_weights", [False, True], ids=["context", "tensor"])
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_two_gpus_predict_what_the_whole_model_does(two: RankProcesses, name: str, splits_weights: bool) -> None:
    forward = record(name)[0]
    of = type(forward.model).__name__, name, forward.component, splits_weights, forward.inputs
    for predictions in two.ask_all(_predict, [of] * 2):
        for one, other in zip(predictions, tree_leaves(forward.output), strict=True):
            torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


def _open() -> StoreAddress:
    _kept["store"] = open_store("127.0.0.1", 2)
    return StoreAddress("127.0.0.1", _kept["store"].port)


def _meet(rank: int, point: StoreAddress) -> None:
    device = _kept["device"] = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = _kept.get("store") or join_store(point.host, point.port, 2)
    group = ParallelGroup(rank, 2, store, name="two", device=device)
    for splits_weights in (False, True):
        _kept[f"parallel {splits_weights}"] = Parallel(group, device, splits_weights=splits_weights)


def _predict(class_name: str, name: str, component: str, splits_weights: bool, inputs: dict[str, Any]) -> Any:
    shard = load_shard(
        getattr(diffusers, class_name),
        fetch_checkpoint(f"tiny://{name}", ()),
        component,
        blocks=None,
        dtype=torch.float32,
        parallel=_kept[f"parallel {splits_weights}"],
    )
    shard.model.to(_kept["device"])
    with torch.inference_mode():
        result = shard.run(tree_map_only(torch.Tensor, lambda tensor: tensor.to(_kept["device"]), inputs))
    return tuple(part.cpu().clone() for part in tree_leaves(result))
