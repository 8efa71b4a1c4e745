"""The messages sent from rank to rank, and their wire format.

host    uint8 [H]   header: batch id, and the byte count of each of the following parts
                    metadata: the pickled message, with a `_Slot` in place of each tensor
                    tensors of the CPU
                    tensors of the accelerator, if they are staged on the CPU
device  uint8 [D]   tensors of the accelerator, if they stay on it

The header tells the receiver how much to receive. Each part, and every tensor, begins at a multiple of 64 bytes.
"""

import io
import math
import pickle
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from cluster.machines import accelerator

_ALIGNMENT_BYTES = 64
_HEADER = struct.Struct("5q")
HEADER_BYTES = _ALIGNMENT_BYTES
_ROOM_PERIOD_S = 0.05
_ROOM_TRIES = 20
"""Number of tries while nothing runs on this rank: memory of finished work may not be free yet."""


@dataclass(frozen=True, eq=False)
class Message:
    """One micro-batch in transit. The body is any picklable nest of tensors, or None if there is an error."""

    batch_id: int
    """Rank 0's ID of the micro-batch, 0 or more."""
    body: Any
    error: BaseException | None = None


class Header(NamedTuple):
    """Batch ID and byte counts, which are multiples of 64."""

    batch_id: int
    num_meta: int
    num_host: int
    num_staged: int
    num_device: int

    @classmethod
    def of(cls, host: Tensor) -> Self:
        """host: the host buffer, or at least its first HEADER_BYTES."""
        return cls(*_HEADER.unpack_from(host.numpy().data))

    @property
    def num_host_bytes(self) -> int:
        """Bytes of the whole host buffer."""
        return HEADER_BYTES + self.num_meta + self.num_host + self.num_staged


@dataclass(frozen=True, eq=False)
class Packed:
    """A message as two flat buffers, in the format at the top of this file."""

    host: Tensor
    device: Tensor

    @property
    def parts(self) -> tuple[Header, Tensor, Tensor, Tensor]:
        """The header, the metadata, the CPU's tensors and the accelerator's."""
        header = Header.of(self.host)
        _, meta, host, staged = self.host.split_with_sizes([HEADER_BYTES, *header[1:4]])
        return header, meta, host, self.device if header.num_device else staged

    @property
    def num_bytes(self) -> int:
        return self.host.nbytes + self.device.nbytes


def never() -> bool:
    """Default of `is_busy`: no other work."""
    return False


def when_there_is_room(
    allocate: Callable[[], Tensor], is_busy: Callable[[], bool] = never, period_s: float = _ROOM_PERIOD_S
) -> Tensor:
    """Retries `allocate` while the GPU is full: running micro-batches free memory.

    is_busy: whether this process has other work that will free memory; while it has, the wait is unlimited.

    Raises torch.OutOfMemoryError if there is still no room when that work is done.
    """
    num_tries = 0
    while is_busy() or num_tries < _ROOM_TRIES:
        num_tries = 0 if is_busy() else num_tries + 1
        try:
            return allocate()
        except torch.OutOfMemoryError:
            time.sleep(period_s)
    return allocate()


def pack(message: Message, staging: torch.device) -> Packed:
    """Copies the message into buffers, tensors of the accelerator to `staging` (itself, or the pinned CPU).

    The copies run on the current stream and may not be complete on return. A message that cannot be packed becomes
    one with an error, so that only this micro-batch fails and not the ring.
    """
    try:
        return _pack(message, staging)
    except torch.OutOfMemoryError as error:
        return _pack(Message(message.batch_id, None, out_of_memory(error)), staging)
    except Exception as error:
        reason = RuntimeError(f"micro-batch {message.batch_id} cannot be sent to another rank: {error!r}")
        return _pack(Message(message.batch_id, None, reason), staging)


def out_of_memory(error: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
    """Returns the same error without its frames, which keep tensors alive."""
    return torch.OutOfMemoryError(str(error))


def unpack(packed: Packed, device: torch.device, is_busy: Callable[[], bool] = never) -> Message:
    """Restores the message, with tensors of the accelerator on `device`; the copies may not be complete on return.

    The tensors are writable views of `packed`, so a small one keeps its whole buffer alive. Strides are kept if
    they are dense, gradients are not. A message that cannot be unpickled, or for which there is no memory, becomes
    one with an error.
    """
    header, meta, host, staged = packed.parts
    try:
        payload = when_there_is_room(lambda: staged.to(device, non_blocking=True), is_busy)
        if accelerator.is_accelerator(payload.device):
            # Allocated on a copy stream: its memory must not be reused before the default stream is done with it.
            payload.record_stream(accelerator.default_stream(payload.device))
        body, error = _Unpickler(io.BytesIO(meta.numpy().data), host, payload).load()
    except torch.OutOfMemoryError as reason:
        body, error = None, out_of_memory(reason)
    except Exception as reason:
        body = None
        error = RuntimeError(f"micro-batch {header.batch_id} cannot be read on another rank: {reason!r}")
    return Message(header.batch_id, body, error)


class _Slot(NamedTuple):
    """A tensor's position in the payload, shape, strides and dtype."""

    is_on_device: bool
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def after(cls, offset: int, tensor: Tensor) -> Self:
        # A dense copy's strides are those of the tensor, unless the tensor has gaps or overlaps itself.
        dense = tensor if tensor.is_contiguous() else torch.empty_like(tensor, device="meta")
        stride = dense.stride()
        return cls(tensor.device.type != "cpu", offset, tuple(tensor.shape), stride, tensor.dtype)

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def view(self, payload: Tensor) -> Tensor:
        return payload[self.offset : self.end].view(self.dtype).as_strided(self.shape, self.stride)

    def fill(self, payload: Tensor, tensor: Tensor) -> None:
        if self.is_on_device:
            self.view(payload).copy_(tensor, non_blocking=True)
            return
        # Plain memcpy (0.1 ms): torch would wake a thread pool beside the thread that computes (2 ms).
        dense = tensor if tensor.stride() == self.stride else tensor.clone()
        source = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
        payload.numpy()[self.offset : self.end] = source.numpy()


class _Pickler(pickle.Pickler):
    """Replaces tensors by slots and records them. A tensor that occurs twice gets one slot."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[tuple[_Slot, Tensor]] = []
        self.num_host, self.num_device = 0, 0
        self._slots: dict[int, tuple[_Slot, Tensor]] = {}  # by id(), which is valid while the tensor is kept here

    def persistent_id(self, item: Any) -> _Slot | None:
        if not isinstance(item, Tensor):
            return None
        if id(item) not in self._slots:
            self._slots[id(item)] = self._place(item), item
        return self._slots[id(item)][0]

    def _place(self, item: Tensor) -> _Slot:
        if type(item) not in (Tensor, nn.Parameter) or item.layout is not torch.strided:
            raise TypeError(f"got a {type(item).__name__} of {item.layout}; only plain dense tensors can be sent")
        tensor = item.detach().resolve_conj().resolve_neg()
        slot = _Slot.after(self.num_host if tensor.device.type == "cpu" else self.num_device, tensor)
        if slot.is_on_device:
            self.num_device = _aligned(slot.end)
        else:
            self.num_host = _aligned(slot.end)
        self.tensors.append((slot, tensor))
        return slot


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, host: Tensor, device: Tensor) -> None:
        super().__init__(file)
        self._host, self._device = host, device
        self._tensors: dict[_Slot, Tensor] = {}

    def persistent_load(self, slot: _Slot) -> Tensor:
        if slot not in self._tensors:
            self._tensors[slot] = slot.view(self._device if slot.is_on_device else self._host)
        return self._tensors[slot]


def _pack(message: Message, staging: torch.device) -> Packed:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump((message.body, None if message.error is None else portable(message.error)))
    meta = file.getbuffer()
    is_staged = staging.type == "cpu"
    num_staged, num_device = (pickler.num_device, 0) if is_staged else (0, pickler.num_device)
    header = Header(message.batch_id, _aligned(len(meta)), pickler.num_host, num_staged, num_device)

    packed = Packed(
        # Pinned if the accelerator's tensors are staged in it.
        torch.empty(header.num_host_bytes, dtype=torch.uint8, pin_memory=num_staged > 0),
        torch.empty(num_device, dtype=torch.uint8, device=staging),
    )
    _HEADER.pack_into(packed.host.numpy().data, 0, *header)
    _, place_of_meta, host, device = packed.parts
    place_of_meta.numpy()[: len(meta)] = meta
    for slot, tensor in pickler.tensors:
        slot.fill(device if slot.is_on_device else host, tensor)
    return packed


def portable(error: BaseException) -> BaseException:
    """Returns the error itself if it can be pickled and unpickled, else a RuntimeError with its text and notes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            plain.add_note(note)
        return plain
    return error


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
