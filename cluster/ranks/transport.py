"""Sends messages from each rank to the next: the interface, and its implementation over torch.distributed."""

import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from cluster.machines import accelerator
from cluster.ranks.message import (
    HEADER_BYTES,
    Header,
    Message,
    Packed,
    never,
    out_of_memory,
    pack,
    unpack,
    when_there_is_room,
)
from cluster.ranks.place import Backend
from cluster.ranks.store_address import listen

_FOREVER = timedelta(days=365)  # a shorter one would end an idle ring; stuck rings are detected elsewhere
_AT_ONCE = timedelta(milliseconds=1)
_TAG, _UNUSED_TAG = 0, 1
_SENDER, _RECEIVER = 0, 1
_NUM_LAST_SIZES = 16
"""Enough for micro-batches of a few different signatures in turn, but few, because receive buffers are as large as
the largest of these sizes."""
_PIECE_BYTES = 2**24
"""Bytes of an accelerator's buffer per transfer. A receiver without memory receives into a buffer of this size."""

dist: Any = torch.distributed  # torch's stubs lack the groups' send and recv


class PeerLost(RuntimeError):
    """A neighbour is gone, or this transport is closed."""


class Transport(Protocol):
    """The connection of one rank to its two neighbours in the ring 0 → 1 → … → 0. One thread may send while
    another receives."""

    @property
    def bytes_sent(self) -> int: ...

    def send(self, message: Message) -> None:
        """Blocks until the next rank has received the message, without a time limit. Raises PeerLost.

        The GPU must be done with the tensors: send does not wait for the compute stream, because the next
        micro-batch may be queued on it already.
        """

    def receive(self, is_busy: Callable[[], bool] = never) -> Message:
        """Blocks until the previous rank has sent a message, without a time limit. Raises PeerLost.

        The tensors are complete, for use on the default stream. A message for which there is no memory is replaced
        by one with an OutOfMemoryError.

        is_busy: whether this rank has other work that will free memory; while it has, receive waits for memory.
        """

    def close(self) -> None:
        """Makes running and later calls raise PeerLost, at once on this rank and shortly after on its
        neighbours."""


def open_store(host: str | socket.socket, world_size: int) -> TCPStore:
    """Opens rank 0's store; the other ranks call `join_store(host, store.port, world_size)`.

    host: an address of this machine that the other ranks can reach, to open a free port on; or a listening socket.
    """
    listening = listen(host) if isinstance(host, str) else host
    address, port, *_ = listening.getsockname()
    return TCPStore(
        address, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def join_store(host: str, port: int, world_size: int) -> TCPStore:
    """Connects any rank but 0 to rank 0's store."""
    return TCPStore(host, port, world_size, is_master=False)


class GroupTransport:
    """Sends everything over gloo, or the accelerator's tensors over NCCL and the rest over gloo.

    Each edge of the ring is a process group of two, a sender and a receiver. In one group of all ranks, NCCL would
    put both directions between two ranks on one stream, where each may wait for the other indefinitely. Besides, a
    rank needs connections to its neighbours only.

    The groups are built without `init_process_group`, as torch's own RPC does: that function is global to the
    process and leaves no room for a second ring. Only `send` and `recv` of the groups are used.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: TCPStore,
        *,
        name: str = "ring",
        backend: Backend,
        device: torch.device,
        connect_timeout_s: float = 300.0,
    ) -> None:
        """Returns when both neighbours are connected; on rank 0, when all ranks are.

        Args:
            store: from `open_store` on rank 0, from `join_store` on the others.
            name: distinguishes this ring from others that use the same store.
            device: where tensors of the accelerator arrive; tensors of the CPU stay on the CPU.
            connect_timeout_s: how long to wait for a neighbour before raising RuntimeError.
        """
        if world_size < 2:
            raise ValueError(f"world_size is {world_size}; a transport needs 2 ranks, a ring of 1 needs none")
        self.bytes_sent = 0
        self._rank = rank
        self._previous_rank, self._next_rank = (rank - 1) % world_size, (rank + 1) % world_size
        self._device = device
        self._staging = device if backend == "nccl" else torch.device("cpu")
        self._store = store  # rank 0's store must exist until all ranks are connected
        self._is_closed = False

        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=connect_timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(store))]
        # Rank 0 connects first and then accepts, the others the reverse, so the ring cannot deadlock.
        for end in (_SENDER, _RECEIVER) if rank == 0 else (_RECEIVER, _SENDER):
            sender = rank if end == _SENDER else self._previous_rank
            edge = _Edge(end, PrefixStore(f"{name}, from rank {sender}", store), options, backend, device)
            if end == _SENDER:
                self._outgoing = edge
            else:
                self._incoming = edge
        self._greet()

    def send(self, message: Message) -> None:
        with accelerator.on_stream(self._outgoing.stream):
            packed = pack(message, self._staging)
            try:
                self._outgoing.send(packed)
                self._check_open()
            except RuntimeError as error:
                raise PeerLost(f"rank {self._rank} cannot send to rank {self._next_rank}: {error}") from error
        self.bytes_sent += packed.num_bytes

    def receive(self, is_busy: Callable[[], bool] = never) -> Message:
        with accelerator.on_stream(self._incoming.stream):
            try:
                message = self._incoming.receive(self._staging, is_busy)
                self._incoming.synchronize()
                self._check_open()
            except RuntimeError as error:
                raise PeerLost(
                    f"rank {self._rank} cannot receive from rank {self._previous_rank}: {error}"
                ) from error
        return message

    def close(self) -> None:
        self._is_closed = True
        self._incoming.close()
        self._outgoing.close()

    def _check_open(self) -> None:
        """Raises RuntimeError if closed: an aborted NCCL transfer looks like a completed one, with arbitrary data
        in its buffer."""
        if self._is_closed:
            raise RuntimeError("this transport is closed")

    def _greet(self) -> None:
        """Passes a greeting round the ring. NCCL connects at its first use: here edge by edge, never two at a
        time."""
        greeting = Message(0, torch.zeros(1, device=self._device))
        accelerator.synchronize(self._device)
        if self._rank == 0:
            self.send(greeting)
            self.receive()
        else:
            self.receive()
            self.send(greeting)
        self.bytes_sent = 0


class _Edge:
    """One end of an edge of the ring.

    A message is one transfer over gloo if it is no larger than one of the last few messages. The receiver expects
    up to that many bytes, so the sender need not wait for an answer; a larger message sends its header ahead.

    On a GPU the edge has a stream of its own with a higher priority than compute, so that transfers do not queue
    behind it. Data from GPU to GPU is sent in pieces: a receiver without memory receives the pieces one after
    another into the same buffer and drops them, so that one micro-batch fails and not the ring.
    """

    def __init__(self, end: int, store: PrefixStore, options: Any, backend: Backend, device: torch.device) -> None:
        self._other_end = 1 - end
        self._device = device
        self.stream = accelerator.open_stream(device, priority=-1)
        """The edge's own stream; None on the CPU."""
        self._gloo = dist.ProcessGroupGloo(PrefixStore("gloo", store), end, 2, options)
        self._nccl: Any = None
        self._spare = torch.empty(0)
        if backend == "nccl":
            nccl_options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            nccl_options._timeout = _FOREVER
            self._nccl = dist.ProcessGroupNCCL(PrefixStore("nccl", store), end, 2, nccl_options)
            if end == _RECEIVER:
                self._spare = torch.empty(_PIECE_BYTES, dtype=torch.uint8, device=device)
        self._last_sizes = deque([HEADER_BYTES], maxlen=_NUM_LAST_SIZES)
        """Bytes of the latest host buffers; the same at both ends."""

    def send(self, packed: Packed) -> None:
        self.synchronize()  # copies end before gloo reads, and the peer GPU need not wait for them
        buffers = [packed.host, *_pieces(packed.device)]
        if packed.host.nbytes > max(self._last_sizes):
            buffers[:1] = packed.host.tensor_split([HEADER_BYTES])
        self._last_sizes.append(packed.host.nbytes)
        for wait in [self._transfer("send", buffer) for buffer in buffers]:
            wait()
        self.synchronize()

    def receive(self, staging: torch.device, is_busy: Callable[[], bool]) -> Message:
        """Receives one message. Its GPU tensors are complete when the stream is done."""
        host = self._empty_host(max(self._last_sizes), staging)
        self._transfer("recv", host)()
        header = Header.of(host)
        self._last_sizes.append(header.num_host_bytes)
        pieces = self._spare_pieces(header.num_device)
        error: torch.OutOfMemoryError | None = None
        try:
            device = when_there_is_room(
                lambda: torch.empty(header.num_device, dtype=torch.uint8, device=staging), is_busy
            )
            pieces = _pieces(device)
        except torch.OutOfMemoryError as reason:
            error = out_of_memory(reason)
        buffers = pieces
        if header.num_host_bytes > host.nbytes:
            ahead, host = host, self._empty_host(header.num_host_bytes, staging)
            first, rest = host.tensor_split([HEADER_BYTES])
            first.copy_(ahead[:HEADER_BYTES])
            buffers = [*pieces, rest]
        for wait in [self._transfer("recv", buffer) for buffer in buffers]:
            wait()
        if error is not None:
            return Message(header.batch_id, None, error)
        return unpack(Packed(host[: header.num_host_bytes], device), self._device, is_busy)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        if self._nccl is not None:
            self._nccl.abort()
        # gloo has no abort, but a transfer that times out closes the connection at both ends.
        with suppress(RuntimeError):
            self._gloo.recv([torch.empty(1)], self._other_end, _UNUSED_TAG).wait(_AT_ONCE)

    def _transfer(self, direction: Literal["send", "recv"], buffer: Tensor) -> Callable[[], object]:
        """Starts a transfer and returns a function that waits for its end. Skips empty buffers, which both ends
        know from the header."""
        if buffer.nbytes == 0:
            return lambda: None
        if not accelerator.is_accelerator(buffer.device):
            return partial(getattr(self._gloo, direction)([buffer], self._other_end, _TAG).wait, _FOREVER)
        return partial(getattr(self._nccl, direction)([buffer], self._other_end, _TAG).wait)  # the stream waits

    def _empty_host(self, num_bytes: int, staging: torch.device) -> Tensor:
        """Allocates a host buffer, pinned if the accelerator's tensors are staged in it."""
        is_pinned = accelerator.is_accelerator(self._device) and not accelerator.is_accelerator(staging)
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)

    def _spare_pieces(self, num_bytes: int) -> list[Tensor]:
        """Returns pieces of the sizes that `_pieces` would cut from num_bytes, all in the same memory."""
        whole, rest = divmod(num_bytes, _PIECE_BYTES)
        return [self._spare] * whole + ([self._spare[:rest]] if rest else [])


def _pieces(buffer: Tensor) -> list[Tensor]:
    return list(torch.split(buffer, _PIECE_BYTES))


def _own_address(store: TCPStore) -> str:
    """Returns the address from which this machine reaches rank 0. Its host name may resolve to the loopback
    address."""
    family, kind, protocol, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing, but chooses the route
        return str(probe.getsockname()[0])
