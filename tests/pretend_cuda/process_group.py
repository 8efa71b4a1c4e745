"""torch.distributed's ProcessGroupNCCL for two ranks, over their store."""

import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from tests.pretend_cuda.streams import Stream, StreamContext, current_stream

CHUNK_BYTES = 4 * 2**20
"""Bytes of one transfer; a store takes no more at once."""
PERIOD_S = 0.001


class Aborted(RuntimeError):
    """The group was aborted while it waited."""


class Work:
    """A transfer that the current stream may wait for."""

    def __init__(self, event: torch.Event) -> None:
        self._event = event

    def wait(self, timeout: timedelta | None = None) -> None:
        current_stream().wait_event(self._event)


class ProcessGroupNCCL:
    """A process group whose transfers run on its own stream, which waits for the caller's, as in NCCL.

    Unlike NCCL's, a receive returns only when it is done. An aborted transfer ends like one that is done.
    """

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self._timeout: timedelta | None = None

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        assert size == 2
        self._store = store.clone()  # a get blocks its connection, for which the other group would wait
        self._rank = rank
        self._streams: dict[torch.device, Stream] = {}
        self._num_sent = self._num_received = 0
        self._is_aborted = False

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        [tensor] = tensors
        stream = self._stream(tensor.device)
        with StreamContext(stream):
            data = tensor.cpu().numpy().tobytes()
            event = stream.record_event()
        tensor.record_stream(stream)
        for at in range(0, len(data), CHUNK_BYTES):
            self._store.set(f"{self._rank} {self._num_sent} {at}", data[at : at + CHUNK_BYTES])
        self._num_sent += 1
        return Work(event)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        [tensor] = tensors
        stream = self._stream(tensor.device)
        try:
            starts = range(0, tensor.nbytes, CHUNK_BYTES)
            data = b"".join(self._take(f"{peer} {self._num_received} {at}") for at in starts)
            self._num_received += 1
        except Aborted:
            data = bytes(tensor.nbytes)
        with StreamContext(stream):
            tensor.copy_(torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape))
            event = stream.record_event()
        tensor.record_stream(stream)
        return Work(event)

    def abort(self) -> None:
        self._is_aborted = True

    def _stream(self, device: torch.device) -> Stream:
        if device not in self._streams:
            self._streams[device] = Stream(device)
        self._streams[device].wait_stream(current_stream(device))
        return self._streams[device]

    def _take(self, key: str) -> bytes:
        while not self._store.check([key]):
            if self._is_aborted:
                raise Aborted
            time.sleep(PERIOD_S)
        data: bytes = self._store.get(key)
        self._store.delete_key(key)
        return data
