"""Tests of rings. Rank 0 runs in the test's process, the others in spawned ones, unless a test says otherwise."""

import multiprocessing
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from cluster.ranks.message import Message, never
from cluster.ranks.ring import Ring, RingStats, RingStuck, StopRing
from cluster.ranks.transport import GroupTransport, PeerLost, join_store, open_store

CPU = torch.device("cpu")
HOST = "127.0.0.1"
SOON_S = 20.0
STEP_S = 0.02

spawn = multiprocessing.get_context("spawn")

Compute = Callable[[Any], Any]


# Functions that ranks compute; at module level, so that they can be sent to other processes.


def sign(rank: int, body: list[int]) -> list[int]:
    return [*body, rank]


def pace(body: Any) -> Any:
    time.sleep(STEP_S)
    return body


def hang(body: Any) -> Any:
    time.sleep(3600)
    return body


class Unspeakable(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("not with me")


def fail(rank: int, body: Any) -> Any:
    """Raises the error that the body names on the rank that it names."""
    if body == ("plain", rank):
        raise ValueError("no such block", 3)
    if body == ("unspeakable", rank):
        raise Unspeakable("no such block")
    return body


class MeetNeighbours:
    """Computes micro-batch k only while the rank before computes k + 1 and the rank after computes k - 1."""

    def __init__(self, rank: int, world_size: int, num_batches: int, port: int) -> None:
        self.rank, self.world_size, self.num_batches = rank, world_size, num_batches
        self.port = port
        self.store: Any = None

    def __call__(self, k: int) -> int:
        self.store = self.store or join_store(HOST, self.port, 1)
        self.store.set(f"rank {self.rank} computes {k}", "")
        awaited = []
        if self.rank > 0 and k + 1 < self.num_batches:
            awaited.append(f"rank {self.rank - 1} computes {k + 1}")
        if self.rank + 1 < self.world_size and k > 0:
            awaited.append(f"rank {self.rank + 1} computes {k - 1}")
        if awaited:
            self.store.wait(awaited)
        return k


# The ranks.


class Rank:
    """One of the ranks from 1 on: a ring and its failures."""

    def open(self, rank: int, world_size: int, port: int, compute: Compute, exits: bool = False) -> None:
        store = join_store(HOST, port, world_size)
        transport = GroupTransport(rank, world_size, store, backend="gloo", device=CPU)
        self.failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.exits = exits
        self.ring = Ring(compute, rank=rank, transport=transport, on_failure=self.on_failure, device=CPU)
        self.ring.start()

    def on_failure(self, error: BaseException) -> None:
        self.failures.put(type(error).__name__)
        if self.exits:
            os._exit(1)

    def failure(self) -> str:
        return self.failures.get(timeout=SOON_S)

    def num_failures(self) -> int:
        return self.failures.qsize()

    def num_threads(self) -> int:
        """Returns the number of the ring's threads after giving it time to end them."""
        deadline = time.monotonic() + SOON_S / 2
        while (num := num_ring_threads()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return num

    def stats(self) -> RingStats:
        return self.ring.stats()

    def close(self) -> None:
        self.ring.close()


def num_ring_threads() -> int:
    return sum(thread.name.startswith("ring-") for thread in threading.enumerate())


def serve_rank(connection: Connection) -> None:
    rank = Rank()
    with suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(rank, method)(*arguments))


class Child:
    """A process with a `Rank` in it."""

    def __init__(self) -> None:
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve_rank, args=(theirs,), daemon=True)
        self.process.start()

    def tell(self, method: str, *arguments: Any) -> None:
        self.connection.send((method, arguments))

    def answer(self) -> Any:
        assert self.connection.poll(SOON_S)
        return self.connection.recv()

    def ask(self, method: str, *arguments: Any) -> Any:
        self.tell(method, *arguments)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(SOON_S)


class Head:
    """Rank 0: feeds bodies to its ring and collects the results."""

    def __init__(self, compute: Compute, transport: GroupTransport | None = None, **options: Any) -> None:
        self.bodies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.num_fed = 0
        self.back: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.ring = Ring(
            compute,
            rank=0,
            transport=transport,
            source=self.source,
            on_failure=self.failures.put,
            **{"sink": self.back.put, "device": CPU} | options,
        )
        self.ring.start()

    def source(self) -> Message:
        item = self.bodies.get()
        if isinstance(item, BaseException):
            raise item
        self.num_fed += 1
        return Message(self.num_fed - 1, item)

    def feed(self, *bodies: Any) -> None:
        for body in bodies:
            self.bodies.put(body)

    def results(self, num: int) -> list[Message]:
        return [self.back.get(timeout=SOON_S) for _ in range(num)]

    def run(self, *bodies: Any) -> list[Message]:
        self.feed(*bodies)
        return self.results(len(bodies))

    def failure(self) -> BaseException:
        return self.failures.get(timeout=SOON_S)

    def close(self) -> None:
        self.feed(StopRing())
        self.ring.close()


class Wire:
    """A transport to and from the test, which stands in for both neighbours."""

    def __init__(self) -> None:
        self.incoming: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.may_send = threading.Event()
        self.sent: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.bytes_sent = 0

    def receive(self, is_busy: Callable[[], bool] = never) -> Message:
        return self.incoming.get()

    def send(self, message: Message) -> None:
        assert self.may_send.wait(SOON_S)
        self.sent.put(message)

    def close(self) -> None:
        pass


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def spares() -> Iterator[list[Child]]:
    """Idle processes. They start together, because importing torch takes seconds in each."""
    children = [Child() for _ in range(5)]
    yield list(children)
    for child in children:
        child.kill()


@pytest.fixture(scope="module")
def pair(spares: list[Child]) -> list[Child]:
    """Two processes that every test leaves alive."""
    return [spares.pop(), spares.pop()]


def open_ring(
    children: Sequence[Child], computes: Sequence[Compute], *, exits: bool = False, **options: Any
) -> Head:
    world_size = len(children) + 1
    store = open_store(HOST, world_size)
    for rank, child in enumerate(children, start=1):
        child.tell("open", rank, world_size, store.port, computes[rank], exits)
    transport = GroupTransport(0, world_size, store, backend="gloo", device=CPU)
    for child in children:
        child.answer()
    return Head(computes[0], transport, **options)


def close_ring(head: Head, children: Sequence[Child]) -> None:
    head.close()
    for child in children:
        child.ask("close")


# A ring of one.


def test_one_rank_computes_in_order_without_a_copy() -> None:
    head = Head(lambda body: body)
    bodies = [torch.zeros(2), torch.zeros(2)]
    assert all(message.body is body for message, body in zip(head.run(*bodies), bodies, strict=True))
    head.close()


def test_one_rank_fails_only_the_micro_batch_at_fault() -> None:
    head = Head(partial(fail, 0))
    good, bad, also_good = head.run("a", ("plain", 0), "b")
    assert (good.body, bad.body, also_good.body) == ("a", None, "b")
    assert isinstance(bad.error, ValueError)
    assert bad.error.__traceback__ is None
    head.close()


def test_a_failed_micro_batch_leaves_nothing_of_it_behind() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def run_out_of_memory() -> None:
        hidden_states = torch.zeros(3)
        made.append(weakref.ref(hidden_states))
        raise MemoryError("of 3")

    def compute(_: Any) -> None:
        try:
            run_out_of_memory()
        except MemoryError as error:
            raise ValueError("too large") from error

    head = Head(compute)
    [failed] = head.run("a")
    assert [hidden_states() for hidden_states in made] == [None]
    assert isinstance(failed.error, ValueError)
    assert "MemoryError: of 3" in failed.error.__notes__[0]
    head.close()


def test_an_idle_rank_keeps_no_micro_batch_alive() -> None:
    head = Head(lambda body: None)
    body = torch.zeros(3)
    alive = weakref.ref(body)
    head.feed(body)
    del body
    head.results(1)
    until(lambda: alive() is None)
    head.close()


@pytest.mark.parametrize(("rank", "has_ends"), [(0, False), (1, True)], ids=["rank 0 without", "rank 1 with"])
def test_only_rank_0_has_a_source_and_a_sink(rank: int, has_ends: bool) -> None:
    ends: dict[str, Any] = {"source": lambda: Message(0, None), "sink": print} if has_ends else {}
    with pytest.raises(ValueError, match="rank 0 needs a source"):
        Ring(pace, rank=rank, on_failure=print, device=CPU, **ends)


# Passing round the ring.


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_computes_every_micro_batch_in_order(world_size: int, pair: list[Child]) -> None:
    children = pair[: world_size - 1]
    head = open_ring(children, [partial(sign, rank) for rank in range(world_size)])
    results = head.run(*([k] for k in range(20)))
    assert [message.batch_id for message in results] == list(range(20))
    assert [message.body for message in results] == [[k, *range(world_size)] for k in range(20)]
    close_ring(head, children)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_compute_at_the_same_time(world_size: int, pair: list[Child]) -> None:
    children, num_batches = pair[: world_size - 1], 6
    store = open_store(HOST, 1)
    computes = [MeetNeighbours(rank, world_size, num_batches, store.port) for rank in range(world_size)]
    head = open_ring(children, computes)
    assert [message.body for message in head.run(*range(num_batches))] == list(range(num_batches))
    close_ring(head, children)


def test_a_rank_receives_while_it_computes() -> None:
    wire, may_compute = Wire(), threading.Event()
    ring = Ring(lambda _: may_compute.wait(SOON_S), rank=1, transport=wire, on_failure=print, device=CPU)
    ring.start()
    for batch_id in range(3):
        wire.incoming.put(Message(batch_id, None))
    until(wire.incoming.empty)
    assert ring.stats().num_computed == 0
    may_compute.set()
    until(lambda: ring.stats().num_computed == 3)
    ring.close(timeout_s=0.1)


def test_a_rank_computes_while_it_sends() -> None:
    wire = Wire()
    ring = Ring(pace, rank=1, transport=wire, on_failure=print, device=CPU)
    ring.start()
    for batch_id in range(3):
        wire.incoming.put(Message(batch_id, None))
    until(lambda: ring.stats().num_computed == 3)
    assert wire.sent.empty()
    wire.may_send.set()
    assert [wire.sent.get(timeout=SOON_S).batch_id for _ in range(3)] == [0, 1, 2]
    ring.close(timeout_s=0.1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_two_micro_batches_for_each_rank_keep_them_busy(world_size: int, pair: list[Child]) -> None:
    children = pair[: world_size - 1]
    head = open_ring(children, [pace] * world_size)
    hidden_states = torch.zeros(100_000)
    head.run(*[hidden_states] * world_size)
    for _ in range(3):  # other processes use these cores too
        if (efficiency := measured_efficiency(head, world_size, hidden_states)) > 0.8:
            break
    assert efficiency > 0.8  # 0.98 on an idle machine; at most 1 / world_size without overlap
    close_ring(head, children)


def measured_efficiency(head: Head, world_size: int, body: Any) -> float:
    num_batches, num_requests = 15 * world_size, 2 * world_size
    began = time.monotonic()
    head.feed(*[body] * num_requests)
    for _ in range(num_batches - num_requests):
        head.feed(head.results(1)[0].body)  # a request's next step
    head.results(num_requests)
    return (num_batches + world_size - 1) * STEP_S / (time.monotonic() - began)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_exception_on_any_rank_fails_only_its_micro_batch(rank: int, pair: list[Child]) -> None:
    head = open_ring(pair, [partial(fail, rank) for rank in range(3)])
    good, plain, unspeakable, also_good = head.run("a", ("plain", rank), ("unspeakable", rank), "b")
    assert (good.body, plain.body, unspeakable.body, also_good.body) == ("a", None, None, "b")
    assert isinstance(plain.error, ValueError)
    assert plain.error.args == ("no such block", 3)
    assert f"On rank {rank}:" in plain.error.__notes__[0]
    assert type(unspeakable.error) is RuntimeError
    assert str(unspeakable.error) == "Unspeakable: no such block"
    assert head.failures.empty()
    close_ring(head, pair)


def test_a_rank_passes_an_error_on_without_computing(pair: list[Child]) -> None:
    head = open_ring(pair, [partial(fail, rank) for rank in range(3)])
    head.run(("plain", 0), "a")
    assert [child.ask("stats").num_computed for child in pair] == [1, 1]
    close_ring(head, pair)


def test_stats_tell_how_busy_each_rank_was(pair: list[Child]) -> None:
    head = open_ring(pair, [pace] * 3)
    began = time.monotonic()
    head.run(*[torch.zeros(100)] * 3)
    took_s = time.monotonic() - began
    time.sleep(STEP_S)  # idle with nothing in flight, which is no bubble
    ring, *others = head.ring.stats(), *(child.ask("stats") for child in pair)
    assert ring.num_computed == 3
    assert ring.busy_s >= 3 * STEP_S
    assert ring.occupied_s is not None
    assert 5 * STEP_S <= ring.occupied_s <= took_s
    for stats in (ring, *others):
        assert stats.bytes_sent > 3 * 400
        assert 0 < stats.busy_s < ring.occupied_s
    assert others[0].occupied_s is None
    close_ring(head, pair)


# The end of a ring.


def test_goodbye_ends_every_rank_in_silence(pair: list[Child]) -> None:
    head = open_ring(pair, [pace] * 3)
    head.run(*range(3))
    head.close()
    assert [child.ask("num_threads") for child in pair] == [0, 0]
    assert [child.ask("num_failures") for child in pair] == [0, 0]
    assert head.failures.empty()
    for child in pair:
        child.ask("close")


def test_goodbye_does_not_wait_for_what_is_in_flight(pair: list[Child]) -> None:
    head = open_ring(pair, [pace] * 3)
    head.feed(*range(500))
    head.results(1)
    began = time.monotonic()
    head.close()
    assert time.monotonic() - began < 500 * STEP_S / 2
    assert head.ring.stats().num_computed < 500
    assert head.failures.empty()
    for child in pair:
        child.ask("close")


def test_ranks_closed_all_at_once_are_silent_too(pair: list[Child]) -> None:
    head = open_ring(pair, [pace] * 3)
    for child in pair:
        child.tell("close")
    head.close()
    for child in pair:
        child.answer()
    assert [child.ask("num_failures") for child in pair] == [0, 0]
    assert head.failures.empty()


def test_a_ring_may_be_closed_by_its_sink_and_then_again() -> None:
    def close_from_within(message: Message) -> None:
        head.close()
        head.back.put(message)

    head = Head(pace, sink=close_from_within)
    head.run("a")
    head.close()
    assert head.failures.empty()


def test_what_is_in_flight_comes_back_after_the_source_has_stopped(pair: list[Child]) -> None:
    head = open_ring(pair, [pace] * 3)
    head.feed("a", "b", StopRing())
    assert [message.body for message in head.results(2)] == ["a", "b"]
    assert head.failures.empty()
    close_ring(head, pair)


def test_a_source_that_fails_fails_the_ring() -> None:
    head = Head(pace)
    head.feed(OSError("the queue broke"))
    assert isinstance(head.failure(), OSError)
    head.ring.close()


def test_a_rank_killed_while_idle_fails_its_neighbours(spares: list[Child]) -> None:
    children = [spares.pop(), spares.pop()]
    head = open_ring(children, [pace] * 3, exits=True)
    head.run("a")
    children[0].kill()
    assert isinstance(head.failure(), PeerLost)  # after rank 2, which noticed it first, has exited
    children[1].process.join(SOON_S)
    assert children[1].process.exitcode == 1
    head.close()


def test_a_rank_killed_in_flight_fails_the_ring_once(spares: list[Child]) -> None:
    child = spares.pop()
    head = open_ring([child], [pace, hang])
    head.feed(*[torch.zeros(100_000)] * 20)
    time.sleep(3 * STEP_S)
    child.kill()
    assert isinstance(head.failure(), PeerLost)
    time.sleep(5 * STEP_S)
    assert head.failures.empty()
    head.close()


def test_a_ring_that_does_not_move_is_stuck() -> None:
    may_end = threading.Event()
    head = Head(lambda body: may_end.wait(SOON_S), stuck_after_s=0.1)
    head.feed("a")
    error = head.failure()
    may_end.set()
    assert isinstance(error, RingStuck)
    assert "1 micro-batches are in flight" in str(error)
    head.close()


def test_an_idle_ring_is_not_stuck_nor_is_one_that_moves() -> None:
    head = Head(pace, stuck_after_s=5 * STEP_S)
    time.sleep(10 * STEP_S)
    assert len(head.run(*range(10))) == 10
    time.sleep(10 * STEP_S)
    assert len(head.run("a")) == 1
    assert head.failures.empty()
    head.close()


# On GPUs.


class Layer:
    """A matrix of weights on a GPU."""

    def __init__(self, seed: int, device: torch.device) -> None:
        chance = torch.Generator(device).manual_seed(seed)
        self.weight = torch.randn(512, 512, device=device, generator=chance) / 512**0.5

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            hidden_states = torch.tanh(hidden_states @ self.weight)
        return hidden_states


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
def test_two_ranks_of_one_gpu_compute_what_one_would() -> None:
    gpu = torch.device("cuda", 0)
    layers = [Layer(seed, gpu) for seed in range(2)]
    batches = [torch.randn(size, 512, device=gpu) for size in [1, 300, 7, 1024] * 10]
    expected = [layers[1](layers[0](batch)) for batch in batches]
    torch.cuda.synchronize()
    store = open_store(HOST, 2)
    other: dict[str, Any] = {}

    def open_other() -> None:
        transport = GroupTransport(1, 2, join_store(HOST, store.port, 2), backend="gloo", device=gpu)
        other["ring"] = Ring(layers[1], rank=1, transport=transport, on_failure=print, device=gpu)
        other["ring"].start()

    opening = threading.Thread(target=open_other)
    opening.start()
    head = Head(layers[0], GroupTransport(0, 2, store, backend="gloo", device=gpu), device=gpu)
    opening.join(SOON_S)
    for message, tensor in zip(head.run(*batches), expected, strict=True):
        assert torch.equal(message.body, tensor)
    head.close()
    other["ring"].close()


def test_what_other_ranks_cannot_compute_fails_here_before_it_is_computed_or_after() -> None:
    """The ranks agree on the error: for batch 1 before computing it, for batch 2 after."""
    computed: list[int] = []
    asked: list[int] = []
    landed: queue.SimpleQueue[Message] = queue.SimpleQueue()
    messages = iter([Message(i, i) for i in range(4)])

    def source() -> Message:
        try:
            return next(messages)
        except StopIteration:
            raise StopRing from None

    def compute(body: int) -> int:
        computed.append(body)
        return body

    def agree(batch_id: int, error: BaseException | None) -> BaseException | None:
        asked.append(batch_id)
        is_theirs = asked.count(batch_id) == batch_id and batch_id in (1, 2)
        return MemoryError("theirs") if is_theirs else error

    ring = Ring(compute, source=source, sink=landed.put, on_failure=pytest.fail, device=CPU, agree=agree)
    ring.start()
    ends = [landed.get(timeout=SOON_S) for _ in range(4)]
    ring.close()
    assert [repr(message.error) for message in ends] == ["None", *["MemoryError('theirs')"] * 2, "None"]
    assert computed == [0, 2, 3]


def test_who_is_no_longer_in_step_with_the_others_loses_the_ring() -> None:
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def agree(_batch_id: int, _error: BaseException | None) -> BaseException | None:
        raise PeerLost("it says nothing")

    source = iter([Message(0, 0)])
    ring = Ring(
        sign, source=partial(next, source), sink=pytest.fail, on_failure=failures.put, device=CPU, agree=agree
    )
    ring.start()
    assert isinstance(failures.get(timeout=SOON_S), PeerLost)
    ring.close()
