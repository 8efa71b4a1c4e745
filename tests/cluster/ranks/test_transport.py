"""Tests of transports. A spawned process, or a thread of the test, plays the neighbour."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil
import pytest
import ray
import torch

from cluster.ranks.message import Message, pack
from cluster.ranks.object_store_transport import ObjectStoreTransport, open_mailboxes
from cluster.ranks.place import Place, plan_backend
from cluster.ranks.transport import (
    Backend,
    GroupTransport,
    PeerLost,
    Transport,
    join_store,
    open_store,
)

CPU = torch.device("cpu")
HOST = "127.0.0.1"
SOON_S = 20.0
ARRIVING: list[Transport] = []
"""The transport that unpickling a `Closing` closes."""
DTYPES = [torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.float8_e4m3fn]

spawn = multiprocessing.get_context("spawn")


class Closing:
    """Closes the transport that receives it."""

    def __reduce__(self) -> Any:
        return close_arriving, ()


def close_arriving() -> None:
    ARRIVING.pop().close()


def echo(port: int, backend: Backend, device: str) -> None:
    """Rank 1 of 2, in its own process: sends back whatever it receives."""
    store = join_store(HOST, port, 2)
    transport = GroupTransport(1, 2, store, backend=backend, device=torch.device(device))
    with suppress(PeerLost):
        while True:
            transport.send(transport.receive())


@contextmanager
def echoed(backend: Backend = "gloo", devices: Sequence[str] = ("cpu", "cpu")) -> Iterator[tuple[Any, Any]]:
    """Yields rank 0's transport and the process at its other end."""
    store = open_store(HOST, 2)
    process = spawn.Process(target=echo, args=(store.port, backend, devices[1]), daemon=True)
    process.start()
    transport = GroupTransport(0, 2, store, backend=backend, device=torch.device(devices[0]))
    yield transport, process
    transport.close()
    process.join(SOON_S)
    assert process.exitcode is not None


@pytest.fixture(scope="module")
def echo_transport() -> Iterator[GroupTransport]:
    with echoed() as (transport, _):
        yield transport


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def connect(
    threads: ThreadPoolExecutor, world_size: int, device: torch.device = CPU, **options: Any
) -> list[GroupTransport]:
    """Returns the transports of all ranks of a ring, in this process."""
    store = open_store(HOST, world_size)

    def connect_one(rank: int) -> GroupTransport:
        own_store = store if rank == 0 else join_store(HOST, store.port, world_size)
        return GroupTransport(rank, world_size, own_store, backend="gloo", device=device, **options)

    return list(threads.map(connect_one, range(world_size)))


@pytest.fixture
def pair(threads: ThreadPoolExecutor) -> Iterator[list[GroupTransport]]:
    transports = connect(threads, 2)
    yield transports
    for transport in transports:
        transport.close()


@pytest.fixture(scope="module")
def mailboxes() -> Iterator[list[Any]]:
    with ExitStack() as stack:
        if not ray.is_initialized():
            ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            stack.callback(ray.shutdown)
        yield open_mailboxes(2)


def sample_body(device: torch.device = CPU) -> dict[str, Any]:
    chance = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (6, 64), generator=chance, dtype=torch.uint8)
    body: dict[str, Any] = {str(dtype): bits.view(dtype).t().to(device) for dtype in DTYPES}
    return body | {"nested": [(torch.zeros(0, 4, device=device), torch.tensor(1.5))], "text": "a cat"}


def assert_same(arrived: Any, sent: dict[str, Any]) -> None:
    assert arrived.keys() == sent.keys()
    assert arrived["text"] == sent["text"]
    pairs = [(arrived[str(dtype)], sent[str(dtype)]) for dtype in DTYPES]
    pairs += zip(arrived["nested"][0], sent["nested"][0], strict=True)
    for a, b in pairs:
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("places", "backend"),
    [
        pytest.param([("a", "0"), ("a", "1")], "nccl", id="a GPU for each"),
        pytest.param([("a", "0"), ("b", "0")], "nccl", id="same number, other node"),
        pytest.param([("a", "0"), ("a", "0")], "gloo", id="one GPU for two"),
        pytest.param([("a", "0"), ("b", "0"), ("b", "0")], "gloo", id="one GPU for two of three"),
        pytest.param([("a", "0"), ("a", None)], "gloo", id="one without a GPU"),
        pytest.param([("a", "MIG-1f3e"), ("a", "MIG-5b77")], "gloo", id="a slice for each"),
        pytest.param([("a", None), ("b", None)], "gloo", id="no GPU"),
    ],
)
def test_nccl_needs_a_gpu_for_each_rank(places: list[tuple[str, str | None]], backend: str) -> None:
    assert plan_backend([Place(*place) for place in places]) == backend


def test_two_stores_open_on_ports_of_their_own() -> None:
    first, second = open_store(HOST, 2), open_store(HOST, 2)
    assert first.port != second.port


def test_ranks_listen_where_they_meet_and_nowhere_else(threads: ThreadPoolExecutor) -> None:
    before = listening()
    transports = connect(threads, 2)
    assert {address.ip for address in listening() - before} == {HOST}
    for transport in transports:
        transport.close()


def listening() -> set[Any]:
    sockets = psutil.Process().net_connections("tcp")
    return {socket.laddr for socket in sockets if socket.status == psutil.CONN_LISTEN}


def test_a_transport_for_one_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size is 1"):
        GroupTransport(0, 1, open_store(HOST, 1), backend="gloo", device=CPU)


def test_every_bit_gets_to_another_process_and_back(echo_transport: GroupTransport) -> None:
    echo_transport.send(Message(5, sample_body()))
    message = echo_transport.receive()
    assert message.batch_id == 5
    assert_same(message.body, sample_body())


def test_an_error_gets_to_another_process_and_back(echo_transport: GroupTransport) -> None:
    echo_transport.send(Message(6, None, ValueError("no such block")))
    error = echo_transport.receive().error
    assert isinstance(error, ValueError)
    assert error.args == ("no such block",)


def test_messages_keep_their_order_while_both_directions_are_busy(
    echo_transport: GroupTransport, threads: ThreadPoolExecutor
) -> None:
    sizes = [3_000_000, 1, 0, 70_000] * 5 + [1] * 20 + [3_000_000, 70_000, 4_000_000]  # large again at last

    def send_all() -> None:
        for batch_id, size in enumerate(sizes):
            echo_transport.send(Message(batch_id, torch.full((size,), batch_id)))

    sending = threads.submit(send_all)
    for batch_id, size in enumerate(sizes):
        message = echo_transport.receive()
        assert message.batch_id == batch_id
        assert torch.equal(message.body, torch.full((size,), batch_id))
    sending.result(SOON_S)


def test_bytes_are_counted_where_they_are_sent(pair: list[GroupTransport], threads: ThreadPoolExecutor) -> None:
    message = Message(0, torch.zeros(1000))
    receiving = threads.submit(pair[1].receive)
    pair[0].send(message)
    receiving.result(SOON_S)
    assert [transport.bytes_sent for transport in pair] == [pack(message, CPU).num_bytes, 0]


def test_three_ranks_send_round_the_ring(threads: ThreadPoolExecutor) -> None:
    ring = connect(threads, 3)
    receiving = [threads.submit(transport.receive) for transport in ring]
    for rank, transport in enumerate(ring):
        transport.send(Message(rank, None))
    assert [future.result(SOON_S).batch_id for future in receiving] == [2, 0, 1]
    for transport in ring:
        transport.close()


def test_two_rings_in_one_process_keep_apart(threads: ThreadPoolExecutor) -> None:
    rings = [connect(threads, 2), connect(threads, 2)]
    receiving = [threads.submit(ring[1].receive) for ring in rings]
    for batch_id, ring in enumerate(rings):
        ring[0].send(Message(batch_id, None))
    assert [future.result(SOON_S).batch_id for future in receiving] == [0, 1]
    for ring in rings:
        ring[0].close()


def test_a_neighbour_that_never_comes_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        GroupTransport(0, 2, open_store(HOST, 2), backend="gloo", device=CPU, connect_timeout_s=0.3)


def test_an_idle_ring_outlives_its_connect_timeout(threads: ThreadPoolExecutor) -> None:
    first, second = connect(threads, 2, connect_timeout_s=0.3)
    receiving = threads.submit(second.receive)
    time.sleep(0.6)
    assert not receiving.done()
    first.send(Message(1, None))
    assert receiving.result(SOON_S).batch_id == 1
    first.close()


def test_close_ends_calls_in_progress_here_and_at_the_neighbour(
    pair: list[GroupTransport], threads: ThreadPoolExecutor
) -> None:
    receiving: list[Future[Message]] = [threads.submit(transport.receive) for transport in pair]
    time.sleep(0.1)
    pair[0].close()
    for future in receiving:
        with pytest.raises(PeerLost):
            future.result(SOON_S)
    with pytest.raises(PeerLost, match="rank 0 cannot send to rank 1"):
        pair[0].send(Message(0, None))


def test_what_arrives_while_the_transport_is_closed_is_not_delivered(
    pair: list[GroupTransport], threads: ThreadPoolExecutor
) -> None:
    """The data may be arbitrary: an aborted NCCL transfer looks like a completed one."""
    ARRIVING.append(pair[1])
    receiving = threads.submit(pair[1].receive)
    pair[0].send(Message(0, Closing()))
    with pytest.raises(PeerLost, match="closed"):
        receiving.result(SOON_S)


def test_a_killed_neighbour_is_noticed_while_idle() -> None:
    with echoed() as (transport, process):
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(PeerLost, match="rank 0 cannot receive from rank 1"):
            transport.receive()


def exchange(first: Transport, second: Transport, threads: ThreadPoolExecutor) -> list[Message]:
    receiving = threads.submit(lambda: [second.receive() for _ in range(3)])
    first.send(Message(0, sample_body()))
    first.send(Message(1, None, KeyError("block")))
    first.send(Message(2, lambda: None))
    return receiving.result(SOON_S)


def test_the_object_store_delivers_what_gloo_delivers(
    pair: list[GroupTransport], mailboxes: list[Any], threads: ThreadPoolExecutor
) -> None:
    plain = [ObjectStoreTransport(rank, mailboxes, device=CPU) for rank in range(2)]
    by_store = exchange(plain[0], plain[1], threads)
    by_group = exchange(pair[0], pair[1], threads)
    for stored, sent in zip(by_store, by_group, strict=True):
        assert (stored.batch_id, repr(stored.error)) == (sent.batch_id, repr(sent.error))
    assert_same(by_store[0].body, by_group[0].body)
    assert_same(by_store[0].body, sample_body())
    by_store[0].body["nested"][0][1].add_(1)  # writable, although the object store's memory is not
    assert plain[0].bytes_sent == pair[0].bytes_sent


def test_a_closed_object_store_transport_ends_its_receive_and_its_neighbours(
    mailboxes: list[Any], threads: ThreadPoolExecutor
) -> None:
    first, second = (ObjectStoreTransport(rank, mailboxes, device=CPU) for rank in range(2))
    receiving = [threads.submit(transport.receive) for transport in (first, second)]
    first.close()
    for future in receiving:
        with pytest.raises(PeerLost):
            future.result(SOON_S)
    with pytest.raises(PeerLost):
        first.send(Message(0, None))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_brings_tensors_from_gpu_to_gpu_and_back(threads: ThreadPoolExecutor) -> None:
    gpu = torch.device("cuda", 0)
    with echoed("nccl", ("cuda:0", "cuda:1")) as (transport, _):
        body = sample_body(gpu)
        torch.cuda.synchronize()
        sending = threads.submit(lambda: [transport.send(Message(batch_id, body)) for batch_id in range(20)])
        for batch_id in range(20):
            message = transport.receive()
            assert message.batch_id == batch_id
            assert_same(message.body, body)
        sending.result(SOON_S)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
def test_gloo_brings_tensors_between_two_ranks_of_one_gpu(threads: ThreadPoolExecutor) -> None:
    gpu = torch.device("cuda", 0)
    first, second = connect(threads, 2, gpu)
    body = sample_body(gpu)
    torch.cuda.synchronize()
    receiving = threads.submit(second.receive)
    first.send(Message(0, body))
    assert_same(receiving.result(SOON_S).body, body)
    first.close()


@pytest.mark.gpu
@pytest.mark.pretended_gpu  # its memory is as full as the test makes it
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_over_nccl_what_finds_no_room_fails_alone(threads: ThreadPoolExecutor) -> None:
    """The receiver drops the message's pieces, and the ring goes on."""
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    store = open_store(HOST, 2)
    joining = threads.submit(
        lambda: GroupTransport(1, 2, join_store(HOST, store.port, 2), backend="nccl", device=there)
    )
    first = GroupTransport(0, 2, store, backend="nccl", device=here)
    second = joining.result(SOON_S)
    body = torch.arange(3 * 2**22 + 5, device=here, dtype=torch.int32)
    torch.cuda.synchronize()
    total = torch.cuda.get_device_properties(there).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_allocated(there) / total, there)
    receiving = threads.submit(second.receive)
    first.send(Message(0, body))
    message = receiving.result(SOON_S)
    torch.cuda.set_per_process_memory_fraction(1.0, there)
    assert (message.batch_id, message.body) == (0, None)
    assert isinstance(message.error, torch.OutOfMemoryError)
    receiving = threads.submit(second.receive)
    first.send(Message(1, body))
    assert torch.equal(receiving.result(SOON_S).body.cpu(), body.cpu())
    first.close()
