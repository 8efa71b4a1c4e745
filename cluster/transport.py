"""How messages get from each rank to the next: the interface, and torch.distributed as its implementation."""

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

from cluster import accelerator
from cluster.meeting import listen
from cluster.message import (
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
from cluster.place import Backend

_FOREVER = timedelta(days=365)  # a shorter one would end an idle ring; whether a ring is stuck is its own matter
_AT_ONCE = timedelta(milliseconds=1)
_TAG, _UNUSED_TAG = 0, 1
_SENDER, _RECEIVER = 0, 1
_NUM_LAST_SIZES = 16
"""Long enough for micro-batches of a few signatures in turn, short because each keeps the room of the largest."""
_PIECE_BYTES = 2**24
"""Of a buffer on the accelerator, in one transfer: so much room its receiver keeps for what it has no room for."""

dist: Any = torch.distributed  # its stubs lack the groups' send and recv


class PeerLost(RuntimeError):
    """A neighbour is gone, or this transport is closed."""


class Transport(Protocol):
    """One rank's two neighbours in the ring 0 → 1 → … → 0. One thread may send while another receives."""

    @property
    def bytes_sent(self) -> int: ...

    def send(self, message: Message) -> None:
        """Block until the next rank has it, however long it takes. Raises PeerLost.

        The GPU must be done with the tensors. Send does not wait for the compute stream, because the next
        micro-batch may be on it already.
        """

    def receive(self, is_busy: Callable[[], bool] = never) -> Message:
        """Block until the rank before has sent something, however long it takes. Raises PeerLost.

        Tensors are complete, and for use on the default stream. What finds no room is a message with an
        OutOfMemoryError.

        is_busy: whether this rank is at other work, which will give memory back; so long it waits for room.
        """

    def close(self) -> None:
        """Let calls in progress and any later one raise PeerLost, here at once and then at the neighbours."""


def open_store(host: str | socket.socket, world_size: int) -> TCPStore:
    """Rank 0's meeting point; the others `join_store(host, store.port, world_size)`.

    host: an address of this machine that the other ranks can reach, for a free port; or what listens on one.
    """
    listening = listen(host) if isinstance(host, str) else host
    address, port, *_ = listening.getsockname()
    return TCPStore(
        address, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def join_store(host: str, port: int, world_size: int) -> TCPStore:
    """What every rank but 0 meets the others with."""
    return TCPStore(host, port, world_size, is_master=False)


class GroupTransport:
    """Everything over gloo, or the accelerator's tensors over NCCL and the rest over gloo.

    Each edge of the ring is a group of two, a sender and a receiver. In one group of all ranks NCCL would put
    what two ranks send each other on one stream, where each may wait for the other for ever. Besides, a rank
    needs no connection but to its neighbours.

    The groups are built without `init_process_group`, as torch's own RPC does: that one is global to the
    process and leaves no room for a second ring. Of the groups only `send` and `recv` are used.
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
            name: tells this ring from others that meet there.
            device: where tensors of the accelerator arrive; tensors of the CPU stay there.
            connect_timeout_s: how long to wait for a neighbour; then raises RuntimeError.
        """
        if world_size < 2:
            raise ValueError(f"world_size is {world_size}; a transport needs 2 ranks, a ring of 1 needs none")
        self.bytes_sent = 0
        self._rank = rank
        self._previous_rank, self._next_rank = (rank - 1) % world_size, (rank + 1) % world_size
        self._device = device
        self._staging = device if backend == "nccl" else torch.device("cpu")
        self._store = store  # rank 0's must live until all have met
        self._is_closed = False

        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=connect_timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(store))]
        # Rank 0 calls and then answers, the others answer and then call: nobody waits in a circle.
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
        """What NCCL is told to abort ends like what is done, but the buffer holds anything."""
        if self._is_closed:
            raise RuntimeError("this transport is closed")

    def _greet(self) -> None:
        """Pass a greeting round. NCCL connects when first used: here edge by edge, never two at a time."""
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

    A message is one transfer over gloo if it is no larger than one of the last few. That much the receiver is
    ready for, so that what comes need not wait for its answer: a larger one sends its header ahead.

    On a GPU it has a stream of its own that goes before compute, so that nothing queues up behind that. What goes
    from GPU to GPU goes in pieces: a receiver without room takes one after another into the same place and drops
    them, so that one micro-batch fails and not the ring.
    """

    def __init__(self, end: int, store: PrefixStore, options: Any, backend: Backend, device: torch.device) -> None:
        self._other_end = 1 - end
        self._device = device
        self.stream = accelerator.open_stream(device, priority=-1)
        """None on the CPU."""
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
        """Of host buffers, in bytes; the same at both ends."""

    def send(self, packed: Packed) -> None:
        self.synchronize()  # the copies: gloo must not read before they are done, nor the other GPU wait for them
        buffers = [packed.host, *_pieces(packed.device)]
        if packed.host.nbytes > max(self._last_sizes):
            buffers[:1] = packed.host.tensor_split([HEADER_BYTES])
        self._last_sizes.append(packed.host.nbytes)
        for wait in [self._transfer("send", buffer) for buffer in buffers]:
            wait()
        self.synchronize()

    def receive(self, staging: torch.device, is_busy: Callable[[], bool]) -> Message:
        """What of it is on a GPU is complete when the stream is done."""
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
        # gloo has no abort, but whatever times out takes its connection down, at both ends.
        with suppress(RuntimeError):
            self._gloo.recv([torch.empty(1)], self._other_end, _UNUSED_TAG).wait(_AT_ONCE)

    def _transfer(self, direction: Literal["send", "recv"], buffer: Tensor) -> Callable[[], object]:
        """Begin it; call what it returns to wait for the end. Both ends know from the header what is empty."""
        if buffer.nbytes == 0:
            return lambda: None
        if not accelerator.is_accelerator(buffer.device):
            return partial(getattr(self._gloo, direction)([buffer], self._other_end, _TAG).wait, _FOREVER)
        return partial(getattr(self._nccl, direction)([buffer], self._other_end, _TAG).wait)  # the stream waits

    def _empty_host(self, num_bytes: int, staging: torch.device) -> Tensor:
        """Pinned if the accelerator's tensors are staged in it."""
        is_pinned = accelerator.is_accelerator(self._device) and not accelerator.is_accelerator(staging)
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)

    def _spare_pieces(self, num_bytes: int) -> list[Tensor]:
        """As `_pieces` would cut so many bytes, all in the same place."""
        whole, rest = divmod(num_bytes, _PIECE_BYTES)
        return [self._spare] * whole + ([self._spare[:rest]] if rest else [])


def _pieces(buffer: Tensor) -> list[Tensor]:
    return list(torch.split(buffer, _PIECE_BYTES))


def _own_address(store: TCPStore) -> str:
    """The address this machine reaches rank 0 from. What its host name resolves to may be the loopback."""
    family, kind, protocol, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing, but chooses a route
        return str(probe.getsockname()[0])
