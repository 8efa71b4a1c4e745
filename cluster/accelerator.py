"""The accelerator, whichever torch was built for: the one place that asks torch's device modules.

CUDA's and ROCm's GPUs are "cuda" to torch, Intel's are "xpu". Each function takes the device that it is about. On
the CPU what only waits or tidies up does nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def find_device() -> torch.device | None:
    """The accelerator that this thread would use, with its number, as tensors tell it; None without one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else torch.device(device.type, _module(device).current_device())


def is_accelerator(device: torch.device) -> bool:
    """Whether the host must wait for its work, and copy what it is to read."""
    return device.type not in ("cpu", "meta")


def has_nccl(device: torch.device) -> bool:
    """NVIDIA's, or ROCm's under the same name. Tensors of other accelerators go by way of the CPU."""
    return device.type == "cuda"


def device_names() -> list[str]:
    """Of all accelerators of this machine that this process may use."""
    device = find_device()
    return (
        []
        if device is None
        else [_module(device).get_device_name(i) for i in range(torch.accelerator.device_count())]
    )


def use_device(device: torch.device) -> None:
    """Make it this thread's own, if it has a number."""
    if is_accelerator(device) and device.index is not None:
        _module(device).set_device(device)


def load_libraries(device: torch.device) -> None:
    """Of matrices and equations, before threads use them and before memory is short.

    torch loads its solvers at the first call, and a second thread that comes meanwhile fails
    (https://github.com/pytorch/pytorch/issues/90613); a handle of cuBLAS takes memory that torch does not count.
    """
    identity = torch.eye(2, device=device)
    torch.linalg.solve(identity, identity @ identity)
    synchronize(device)


# Order of work.


def synchronize(device: torch.device) -> None:
    """Wait for all that was queued. Raises RuntimeError, now and ever after, if the device is lost."""
    if is_accelerator(device):
        _module(device).synchronize(device)


def synchronize_stream(device: torch.device) -> None:
    """Wait for what was queued on this thread's current stream."""
    if is_accelerator(device):
        current_stream(device).synchronize()


def is_lost(device: torch.device) -> bool:
    """Whether an earlier error, of whatever call, has ended the process's use of it for good. Does not wait."""
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
    """The one that threads compute on unless told otherwise."""
    return _module(device).default_stream(device) if device.type == "cuda" else current_stream(device)


def open_stream(device: torch.device, *, priority: int = 0) -> Any:
    """One more stream; None on the CPU, which has no order but the threads'. priority: lower goes first."""
    return _module(device).Stream(device, priority=priority) if is_accelerator(device) else None


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """With it as the current stream; with None, of the CPU, nothing changes."""
    return nullcontext() if stream is None else _module(stream.device).stream(stream)


def record_event(stream: Any) -> Any:
    """An event that is done when the stream has done what was queued on it by now."""
    event = _module(stream.device).Event()
    event.record(stream)
    return event


def mark_queued(device: torch.device) -> Any:
    """An event that is done when all that this thread has queued by now is; None on the CPU."""
    return record_event(current_stream(device)) if is_accelerator(device) else None


def queue_after(event: Any, device: torch.device) -> None:
    """What this thread queues from now on waits for it; the thread itself does not."""
    if event is not None:
        current_stream(device).wait_event(event)


def wait_for(event: Any) -> None:
    """Block this thread until it is done; None, of the CPU, is."""
    if event is not None:
        event.synchronize()


def use_here(tensor: torch.Tensor) -> None:
    """Its memory is of another stream, which may not use it again before this thread's stream is done with it."""
    if is_accelerator(tensor.device):
        tensor.record_stream(current_stream(tensor.device))


def default_generators(device: torch.device) -> list[torch.Generator]:
    """What draws there without being given a generator; none on the CPU."""
    return [_module(device).default_generators[device.index]] if is_accelerator(device) else []


# Memory.


def total_bytes(device: torch.device) -> int:
    return int(_module(device).get_device_properties(device).total_memory)


def limit_bytes(device: torch.device, num_bytes: int) -> None:
    """Have torch's allocator refuse this process more."""
    fraction = min(1.0, num_bytes / total_bytes(device))
    _module(device).set_per_process_memory_fraction(fraction, device.index)


def empty_cache(device: torch.device) -> None:
    """Give back what torch keeps for later: no other process can use it."""
    if is_accelerator(device):
        _module(device).empty_cache()


def allocated_bytes(device: torch.device) -> int:
    """Of this process's tensors, now."""
    return int(_module(device).memory_allocated(device))


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """(allocated, reserved) at most since `reset_peaks`."""
    module = _module(device)
    return int(module.max_memory_allocated(device)), int(module.max_memory_reserved(device))


def reset_peaks(device: torch.device) -> None:
    _module(device).reset_peak_memory_stats(device)


def device_uuid(device: torch.device) -> str:
    """The same for all processes of a node that use this very device, by whatever number."""
    return str(_module(device).get_device_properties(device).uuid)


def _module(device: torch.device) -> Any:
    """`torch.cuda`, `torch.xpu`."""
    return torch.get_device_module(device)
