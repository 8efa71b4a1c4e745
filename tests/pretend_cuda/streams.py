"""torch.cuda's streams and events, made of torch's own for the simulated device."""

from typing import Any

import torch

CUDA = int(torch._C._autograd.DeviceType.CUDA)


def index_of(device: Any = None) -> int:
    """Returns the index of a device, given as torch.cuda takes it: None, a number, a name or a device."""
    if device is None:
        return torch._C._accelerator_getDeviceIndex()
    if isinstance(device, int):
        return torch._C._accelerator_getDeviceIndex() if device < 0 else device
    device = torch.device(device)
    return torch._C._accelerator_getDeviceIndex() if device.index is None else int(device.index)


class Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0, **ids: int) -> "Stream":
        if ids:
            return super().__new__(cls, **ids)
        made = torch.Stream(torch.device("cuda", index_of(device)))
        return as_cuda(made)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def record_event(self, event: "torch.Event | None" = None) -> torch.Event:
        event = event or Event()
        event.record(self)
        return event


class Event(torch.Event):
    def __new__(cls, enable_timing: bool = False, blocking: bool = False, **_: bool) -> "Event":
        return super().__new__(cls, "cuda", enable_timing=enable_timing, blocking=blocking)

    def record(self, stream: torch.Stream | None = None) -> None:
        super().record(stream or current_stream())

    def wait(self, stream: torch.Stream | None = None) -> None:
        super().wait(stream or current_stream())


class StreamContext:
    """A context that makes the stream current; None leaves the current stream."""

    def __init__(self, stream: torch.Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        if self._stream is not None:
            self._device = torch._C._accelerator_getDeviceIndex()
            self._before = current_stream(self._stream.device_index)
            set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            set_stream(self._before)
            torch._C._accelerator_setDeviceIndex(self._device)


def as_cuda(stream: torch.Stream) -> Stream:
    return Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=CUDA)


def current_stream(device: Any = None) -> Stream:
    return as_cuda(torch._C._accelerator_getStream(index_of(device)))


def default_stream(device: Any = None) -> Stream:
    return Stream(stream_id=0, device_index=index_of(device), device_type=CUDA)


def set_stream(stream: torch.Stream) -> None:
    torch._C._accelerator_setStream(stream)
