"""The whole engine in one process, with a real shard; also what happens when its last request has left."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from cluster.ranks.ring import Ring
from cluster.ranks.transport import GroupTransport, join_store, open_store
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.adapters import AdapterLayers
from deployments.engine.constant_cache import ConstantCache, ConstantSender
from deployments.engine.engine import Engine
from deployments.engine.load import LoadedRank, load_rank, open_denoisers
from deployments.engine.merge import Merger, Mergers, build_mergers
from deployments.engine.micro_batch import Blocks, MicroBatchDriver, MicroBatchWorker
from deployments.engine.shard import load_shard
from deployments.errors import OutOfDeviceMemory, ShardGroupLost
from deployments.memory.residency import WeightResidency
from deployments.stages import load_stage
from tests.deployments.memory.tiny_request import build_request
from tests.deployments.recorded import Recorded, record

CPU = torch.device("cpu")
MODEL = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
UNMERGED = {"transformer": Merger("a class without a rule")}
BY_SHAPE = {name: Merger("WanTransformer3DModel") for name in ("transformer", "transformer_2")}
SOON_S = 20.0


@pytest.fixture
def inputs() -> dict[str, Any]:
    encoding = load_stage("encode", MODEL, EncoderConfig(max_sequence_length=16))
    prompt_embeds, pooled, _ = dict(encoding.encode(build_request("flux")))["encode_prompt"]
    return {
        "hidden_states": torch.randn(1, 16, 64),
        "encoder_hidden_states": prompt_embeds,
        "pooled_projections": pooled,
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(16, 3),
    }


@pytest.mark.parametrize(("settings", "makes_room"), [({"offload": "model"}, True), ({}, False)])
def test_room_is_made_when_the_last_request_has_left(
    inputs: dict[str, Any], settings: dict[str, Any], makes_room: bool
) -> None:
    config = TransformerConfig(**settings)
    denoisers = open_denoisers(MODEL, config)
    mergers, idle = build_mergers(denoisers.skeletons), threading.Semaphore(0)
    rank = load_rank(denoisers, MODEL, config, rank=0)
    driver = MicroBatchDriver(rank, mergers, ConstantSender(), {"transformer": frozenset()}, on_idle=idle.release)
    engine = Engine(driver, mergers, config, device=denoisers.device, on_lost=pytest.fail)
    try:
        predictions = []
        for _ in range(2):
            predictions.append(burst(engine, inputs))
            assert idle.acquire(timeout=5 if makes_room else 0.05) == makes_room
        assert torch.equal(*predictions)
        assert not idle.acquire(timeout=0.05), "once for each burst"
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("settings", "is_inference"),
    [
        ({}, True),
        ({"dtype": "bfloat16", "attention_backend": "native"}, True),
        ({"layerwise_casting": True, "dtype": "bfloat16"}, False),
        ({"offload": "sequential"}, False),
        ({"vram_limit_gib": 0.001}, False),
        ({"compile": {"scope": "blocks", "backend": "eager"}}, False),
        ({"device_map": "auto"}, False),
    ],
)
def test_torch_watches_tensors_only_where_a_technique_writes_to_them(
    inputs: dict[str, Any], settings: dict[str, Any], is_inference: bool
) -> None:
    config = TransformerConfig(**settings)
    denoisers = open_denoisers(MODEL, config)
    rank = load_rank(denoisers, MODEL, config, rank=0)
    seen: list[bool] = []
    rank.shards["transformer"].model.norm_out.register_forward_hook(
        lambda *_: seen.append(torch.is_inference_mode_enabled())
    )
    typed = {k: v.to(denoisers.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        [prediction] = rank.run("transformer", typed)
        prediction.add_(1)  # an in-place change, which schedulers may make
    assert seen == [is_inference]


def burst(engine: Engine, inputs: dict[str, Any]) -> torch.Tensor:
    """Runs a forward for each of two requests, which hold their seats at the same time."""
    seats = [engine.queue.join(), engine.queue.join()]
    answers = [engine.forward(seat, "transformer", inputs)[0] for seat in seats]
    for seat in seats:
        engine.queue.leave(seat)
    assert torch.equal(*answers)
    return answers[0]


class Part:
    """A rank's part of models that pass their latents on; it sleeps or fails as the inputs say."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self.seen: list[weakref.ref[torch.Tensor]] = []
        """The embeddings of each forward."""
        self.asked: list[tuple[str, int]] = []
        """The component of each forward, and the number of forwards that were merged in it."""

    def run(self, component: str, inputs: Any, boundary: Any = None, rows: Any = ()) -> Any:
        self.asked.append((component, len(inputs["hidden_states"])))
        self.seen.append(weakref.ref(inputs["embeds"]))
        time.sleep(inputs.get("sleep_s", 0.0))
        if inputs.get("fails_on") == self._rank:
            raise ValueError("no such block")
        if inputs.get("is_much_on") == self._rank and len(inputs["hidden_states"]) > 1:
            raise OutOfDeviceMemory("out of memory")
        if inputs.get("no_room_on") == self._rank:
            raise torch.OutOfMemoryError("tried to allocate")
        is_last = self._rank == self._num_ranks - 1
        return inputs["hidden_states"] if is_last else {"block": inputs["hidden_states"]}


Open = Callable[..., Engine]


@pytest.fixture
def open_engine() -> Iterator[Open]:
    """Yields a function that opens an engine with its workers, all in this process."""
    engines: list[Engine] = []
    workers: list[Ring] = []

    def open_one(
        parts: Sequence[Blocks], *, mergers: Mergers = UNMERGED, on_lost: Any = pytest.fail, **settings: Any
    ) -> Engine:
        num_ranks = len(parts)
        store = open_store("127.0.0.1", num_ranks)

        def connect(rank: int) -> GroupTransport:
            own = store if rank == 0 else join_store("127.0.0.1", store.port, num_ranks)
            return GroupTransport(rank, num_ranks, own, backend="gloo", device=CPU)

        with ThreadPoolExecutor(num_ranks) as threads:
            transport, *others = threads.map(connect, range(num_ranks))
        for rank, other in enumerate(others, start=1):
            worker = MicroBatchWorker(parts[rank], mergers, ConstantCache(CPU))
            workers.append(Ring(worker.run, rank=rank, transport=other, on_failure=print, device=CPU))
            workers[-1].start()
        config = TransformerConfig(shards=num_ranks, **settings)
        driver = MicroBatchDriver(parts[0], mergers, ConstantSender(), dict.fromkeys(mergers, frozenset()))
        engines.append(Engine(driver, mergers, config, device=CPU, transport=transport, on_lost=on_lost))
        return engines[-1]

    yield open_one
    for part in (*engines, *workers):
        part.close()


def forward(engine: Engine, component: str = "transformer", **said: Any) -> Any:
    """Runs one forward of a new request."""
    seat = engine.queue.join()
    try:
        inputs = {"hidden_states": torch.ones(1, 4, 2), "embeds": torch.ones(3), **said}
        return engine.forward(seat, component, inputs)
    finally:
        engine.queue.leave(seat)


def test_tensors_are_let_go_though_the_micro_batch_that_said_so_failed_on_the_way(open_engine: Open) -> None:
    parts = [Part(rank, 3) for rank in range(3)]
    engine = open_engine(parts)
    forward(engine)
    of_rank_0, of_rank_2 = parts[0].seen[0], parts[2].seen[0]
    until(lambda: of_rank_0() is None)
    with pytest.raises(ValueError, match="no such block"):
        forward(engine, fails_on=1)
    assert of_rank_2() is not None
    forward(engine)
    assert of_rank_2() is None


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_merged_runs_out_of_memory_runs_alone_and_no_request_fails_for_it(
    open_engine: Open, rank: int
) -> None:
    """A request's embeddings still reach the ranks that its merged micro-batch never reached."""
    parts = [Part(rank, 3) for rank in range(3)]
    engine = open_engine(parts, mergers=BY_SHAPE, batch_wait_ms=1000)
    begin = threading.Barrier(8)

    def request(value: float) -> torch.Tensor:
        begin.wait(SOON_S)
        return forward(engine, hidden_states=torch.full((1, 4, 2), value), is_much_on=rank)

    with ThreadPoolExecutor(8) as threads:
        for value, answer in enumerate(threads.map(request, range(8))):
            assert torch.equal(answer, torch.full((1, 4, 2), float(value)))
    assert max(engine.queue.stats().batch_sizes) > 1


def test_forwards_of_two_models_never_fly_as_one_though_they_look_alike(open_engine: Open) -> None:
    parts = [Part(rank, 2) for rank in range(2)]
    engine = open_engine(parts, mergers=BY_SHAPE, batch_wait_ms=1000)
    names, begin = tuple(BY_SHAPE), threading.Barrier(12)

    def request(value: int) -> torch.Tensor:
        begin.wait(SOON_S)
        return forward(engine, names[value % 2], hidden_states=torch.full((1, 4, 2), float(value)))

    with ThreadPoolExecutor(12) as threads:
        for value, answer in enumerate(threads.map(request, range(12))):
            assert torch.equal(answer, torch.full((1, 4, 2), float(value)))
    assert parts[0].asked == parts[1].asked
    for name in names:
        sizes = [size for component, size in parts[0].asked if component == name]
        assert sum(sizes) == 6
        assert max(sizes) > 1


@pytest.mark.parametrize(("name", "are_merged"), [("ltx2", False), ("z-image", True)])
def test_each_request_gets_all_that_the_model_returns(open_engine: Open, name: str, are_merged: bool) -> None:
    """LTX-2 returns two tensors, Z-Image lists of tensors."""
    recorded = [record(name), record(name, "a blue whale under the moon")] * 4
    model_class, folder = type(recorded[0][0].model), fetch_checkpoint(f"tiny://{name}", ())
    shards = [
        load_shard(model_class, folder, "transformer", blocks=blocks, dtype=torch.float32)
        for blocks in [(0, 1), (1, 3)]
    ]
    parts = [
        LoadedRank({"transformer": shard}, WeightResidency({}, TransformerConfig(), CPU), AdapterLayers({}, CPU))
        for shard in shards
    ]
    mergers = build_mergers({"transformer": recorded[0][0].model})
    engine = open_engine(parts, mergers=mergers, batch_wait_ms=1000)
    begin = threading.Barrier(len(recorded))

    def request(forwards: list[Recorded]) -> list[Any]:
        seat = engine.queue.join()
        begin.wait(SOON_S)
        answers = [engine.forward(seat, asked.component, asked.inputs) for asked in forwards]
        engine.queue.leave(seat)
        return answers

    with ThreadPoolExecutor(len(recorded)) as threads:
        for forwards, answers in zip(recorded, threads.map(request, recorded), strict=True):
            for asked, answer in zip(forwards, answers, strict=True):
                torch.testing.assert_close(answer, asked.output, atol=2e-5 if are_merged else 0.0, rtol=0)
    assert (max(engine.queue.stats().batch_sizes) > 1) == are_merged


def test_a_rank_without_room_for_what_it_receives_is_told_as_out_of_memory(open_engine: Open) -> None:
    engine = open_engine([Part(rank, 2) for rank in range(2)])
    with pytest.raises(OutOfDeviceMemory, match="no memory for what the rank before it sends: tried to allocate"):
        forward(engine, no_room_on=1)


@pytest.mark.parametrize("settings", [{"compile": "blocks"}, {}], ids=["compiled", "not compiled"])
def test_ranks_that_compile_may_do_so_one_after_another(open_engine: Open, settings: dict[str, Any]) -> None:
    lost: SimpleQueue[BaseException] = SimpleQueue()
    parts = [Part(rank, 2) for rank in range(2)]
    engine = open_engine(parts, on_lost=lost.put, stuck_after_s=0.5, **settings)
    if settings:
        forward(engine, sleep_s=0.35)
        assert lost.empty()
    else:
        with pytest.raises(ShardGroupLost, match="RingStuck"):
            forward(engine, sleep_s=0.35)
        lost.get(timeout=SOON_S)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.001)
