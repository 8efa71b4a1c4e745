"""Every cut of every architecture computes what plain diffusers computes for its pipeline's call, bit for bit."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from cluster.ranks.message import Message, pack, unpack
from deployments.checkpoints.source import fetch_checkpoint
from deployments.checkpoints.tiny.names import TINY_FAMILIES, TINY_MODULES
from deployments.config.transformer import TransformerConfig
from deployments.engine.adapters import NO_ADAPTERS, AdapterLayers
from deployments.engine.blocks import UNCUTTABLE, block_names, shape_only_inputs
from deployments.engine.constant_cache import ConstantCache, ConstantSender
from deployments.engine.load import LoadedRank
from deployments.engine.merge import build_mergers
from deployments.engine.micro_batch import MicroBatchDriver, MicroBatchWorker
from deployments.engine.shard import Shard, load_shard
from deployments.memory.residency import WeightResidency
from tests.deployments.recorded import Recorded, record

CPU = torch.device("cpu")
UNCUT = ("hunyuan-dit", "latte")
"""Tiny checkpoints whose denoiser runs as one shard (`UNCUTTABLE` says why)."""
QUICK = frozenset(
    {
        "flux2-klein",
        "flux3",
        "chroma",
        "z-image",
        "ideogram4",
        "lumina2",
        "prx",
        "sd35",
        "bria",
        "aura-flow",
        "krea2",
        "wan22-a14b",
        "ltx2",
        "hunyuan-video",
        "kandinsky5-video",
    }
)
"""Checkpoints tested without --thorough: one of each kind of forward."""
ELSEWHERE = {*TINY_FAMILIES, "qwen-image-edit-plus"}
"""Checkpoints not tested here: `test_shard` cuts the families; Plus is qwen-image-edit with twice the tokens."""
WITH_NETS = {name for name in TINY_MODULES if name.endswith("controlnet")}
"""Checkpoints that run as one shard, because their ControlNets declare no blocks and what a ControlNet adds to a
UNet's skips crosses no cut."""
CUT = [name for name in TINY_MODULES if name not in {*UNCUT, *ELSEWHERE, *WITH_NETS}]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cut" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        metafunc.parametrize("cut", [name for name in CUT if is_thorough or name in QUICK])


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's blocks compute their rotary embeddings in float32
def test_every_cut_is_bit_equal(cut: str) -> None:
    distinct = {forward.layout: forward for forward in record(cut)}
    for forward in distinct.values():
        load = cache(lambda start, end, forward=forward: load_blocks(cut, forward, start, end))
        num_blocks = len(block_names(forward.model))
        assert num_blocks > 2
        for cuts in [*((0, at, num_blocks) for at in range(1, num_blocks)), (0, 1, num_blocks - 1, num_blocks)]:
            output = run_chain([load(*blocks) for blocks in pairwise(cuts)], forward)
            assert_equal(output, forward.output)


@pytest.mark.parametrize("name", ["lumina2", "z-image"])
def test_only_the_first_shard_holds_what_runs_before_the_chain(name: str) -> None:
    [forward, *_] = record(name)
    first, last = (load_blocks(name, forward, *blocks) for blocks in [(0, 1), (1, 3)])
    held = [any("refiner" in weight for weight, _ in shard.model.named_parameters()) for shard in (first, last)]
    assert held == [True, False]


@pytest.mark.parametrize("name", UNCUT)
def test_what_is_no_chain_is_refused(name: str) -> None:
    [model, *_] = [forward.model for forward in record(name)]
    why = UNCUTTABLE[type(model).__name__]
    with pytest.raises(ValueError, match=f"cannot be cut into shards: {why}; run it as one shard"):
        block_names(model)


def load_blocks(name: str, forward: Recorded, start: int, end: int) -> Shard:
    folder = fetch_checkpoint(f"tiny://{name}", ())
    return load_shard(type(forward.model), folder, forward.component, blocks=(start, end), dtype=torch.float32)


def run_chain(shards: list[Shard], forward: Recorded) -> Any:
    """Runs the forward as the ranks do; everything that crosses is packed for the wire."""
    name = forward.component
    mergers = build_mergers({name: forward.model})
    ranks = [
        LoadedRank({name: shard}, WeightResidency({}, TransformerConfig(), CPU), AdapterLayers({}, CPU))
        for shard in shards
    ]
    driver = MicroBatchDriver(ranks[0], mergers, ConstantSender(), {name: shape_only_inputs(forward.model)})
    crossed: Any = driver.run(name, [forward.inputs], (), (NO_ADAPTERS,))
    for rank in ranks[1:]:
        crossed = MicroBatchWorker(rank, mergers, ConstantCache(CPU)).run(over_the_wire(crossed))
    return crossed


def over_the_wire(body: Any) -> Any:
    message = unpack(pack(Message(0, body), CPU), CPU)
    assert message.error is None
    return message.body


def assert_equal(output: Any, expected: tuple[Any, ...]) -> None:
    got, wanted = tree_leaves(output), tree_leaves(expected)
    assert len(got) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert all(tensor.std() > 0.01 for tensor in got)
