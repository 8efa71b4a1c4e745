"""The accelerator, of whichever kind torch was built for: the only module that uses torch's device modules.

torch calls CUDA's and ROCm's GPUs "cuda", and Intel's "xpu". On the CPU, functions that only wait or clean up do
nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def find_device() -> torch.device | None:
    """Returns the accelerator that this thread would use, with its index as tensors report it, or None without
    one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else torch.device(device.type, _module(device).current_device())


def is_accelerator(device: torch.device) -> bool:
    """Whether the device works asynchronously and has memory of its own, so that the host must wait and copy."""
    return device.type not in ("cpu", "meta")


def has_nccl(device: torch.device) -> bool:
    """Whether the device has NCCL, or ROCm's version under the same name. Other accelerators send tensors by way
    of the CPU."""
    return device.type == "cuda"


def device_names() -> list[str]:
    """Returns the names of all accelerators of this machine that this process may use."""
    device = find_device()
    return (
        []
        if device is None
        else [_module(device).get_device_name(i) for i in range(torch.accelerator.device_count())]
    )


def use_device(device: torch.device) -> None:
    """Makes the device this thread's current one, if it has an index."""
    if is_accelerator(device) and device.index is not None:
        _module(device).set_device(device)


def is_spoilt_by_fork() -> bool:
    """Whether this process was forked from one that had initialised its accelerators, and so cannot use any."""
    modules = (torch.cuda, torch.xpu, torch.mps)
    return any(getattr(module, "_is_in_bad_fork", bool)() for module in modules)


def load_libraries(device: torch.device) -> None:
    """Loads the matrix and solver libraries before threads use them and before memory is short.

    torch loads its solvers at the first call, and a second thread that calls them meanwhile fails
    (https://github.com/pytorch/pytorch/issues/90613); a cuBLAS handle takes memory that torch does not count.
    """
    identity = torch.eye(2, device=device)
    torch.linalg.solve(identity, identity @ identity)
    synchronize(device)


# Order of work.


def synchronize(device: torch.device) -> None:
    """Waits for all queued work. Raises RuntimeError, at this and every later call, if the device is lost."""
    if is_accelerator(device):
        _module(device).synchronize(device)


def synchronize_stream(device: torch.device) -> None:
    """Waits for the work queued on this thread's current stream."""
    if is_accelerator(device):
        current_stream(device).synchronize()


def is_lost(device: torch.device) -> bool:
    """Whether an earlier error of any call has made the device unusable for this process. Does not wait."""
    if not is_accelerator(device):
        return False
    try:
        current_stream(device).query()
    except RuntimeError:
        return True
    return False


def current_stream(device: torch.device) -> Any:
    return _module(device).current_stream(device)


def default_stream(device: torch.device) -> Any:
    """Returns the stream that threads compute on unless told otherwise."""
    return _module(device).default_stream(device) if device.type == "cuda" else current_stream(device)


def open_stream(device: torch.device, *, priority: int = 0) -> Any:
    """Opens another stream; None on the CPU, where work is ordered by threads only. priority: lower runs first."""
    return _module(device).Stream(device, priority=priority) if is_accelerator(device) else None


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Context in which `stream` is the current stream; None, for the CPU, changes nothing."""
    return nullcontext() if stream is None else _module(stream.device).stream(stream)


def record_event(stream: Any) -> Any:
    """Returns an event that completes with the work queued on the stream so far."""
    event = _module(stream.device).Event()
    event.record(stream)
    return event


def mark_queued(device: torch.device) -> Any:
    """Returns an event that completes with the work this thread has queued so far; None on the CPU."""
    return record_event(current_stream(device)) if is_accelerator(device) else None


def queue_after(event: Any, device: torch.device) -> None:
    """Makes work that this thread queues later wait for the event, without blocking the thread."""
    if event is not None:
        current_stream(device).wait_event(event)


def wait_for(event: Any) -> None:
    """Blocks this thread until the event is complete. None, for the CPU, counts as complete."""
    if event is not None:
        event.synchronize()


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy with the same layout. It is complete once an event of `mark_queued` is; later writes of this
    thread's stream to the tensor do not affect it."""
    if not is_accelerator(tensor.device):
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def use_here(tensor: torch.Tensor) -> None:
    """Keeps memory that another stream allocated from being reused before this thread's stream is done with it."""
    if is_accelerator(tensor.device):
        tensor.record_stream(current_stream(tensor.device))


def default_generators(device: torch.device) -> list[torch.Generator]:
    """Returns the generators that the device's random functions use by default; empty for the CPU."""
    return [_module(device).default_generators[device.index]] if is_accelerator(device) else []


# Memory.


def total_bytes(device: torch.device) -> int:
    return int(_module(device).get_device_properties(device).total_memory)


def limit_bytes(device: torch.device, num_bytes: int) -> None:
    """Makes torch's allocator refuse this process more than num_bytes."""
    fraction = min(1.0, num_bytes / total_bytes(device))
    _module(device).set_per_process_memory_fraction(fraction, device.index)


def empty_cache(device: torch.device) -> None:
    """Releases the memory that torch caches, which no other process could use."""
    if is_accelerator(device):
        _module(device).empty_cache()


def allocated_bytes(device: torch.device) -> int:
    """Returns the bytes of this process's tensors now."""
    return int(_module(device).memory_allocated(device))


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """Returns the peak bytes since `reset_peaks` as (allocated, reserved)."""
    module = _module(device)
    return int(module.max_memory_allocated(device)), int(module.max_memory_reserved(device))


def reset_peaks(device: torch.device) -> None:
    _module(device).reset_peak_memory_stats(device)


def device_uuid(device: torch.device) -> str:
    """Returns an ID that is the same for all processes of a node that use this device, whatever index they give
    it."""
    return str(_module(device).get_device_properties(device).uuid)


def _module(device: torch.device) -> Any:
    """Returns `torch.cuda` or `torch.xpu`."""
    return torch.get_device_module(device)
