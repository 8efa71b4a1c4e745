"""torch.cuda's functions for the simulated device; what torch.accelerator calls is in the native library."""

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed

from tests.pretend_cuda.native_module import load_native
from tests.pretend_cuda.process_group import ProcessGroupNCCL
from tests.pretend_cuda.streams import (
    Event,
    Stream,
    StreamContext,
    current_stream,
    default_stream,
    index_of,
    set_stream,
)

GIB = 2**30
CAPABILITY = (9, 0)
native: Any = None


class Device:
    """torch.cuda.device: a context that selects a device."""

    def __init__(self, device: Any) -> None:
        self._index = index_of(device)

    def __enter__(self) -> None:
        self._before = torch._C._accelerator_exchangeDevice(self._index)

    def __exit__(self, *_: object) -> None:
        torch._C._accelerator_setDeviceIndex(self._before)


def install() -> None:
    """Installs the device in this process; call it once, before any code asks torch for a device."""
    global native
    native = load_native()
    native.set_cards(visible_cards(), int(os.environ["PRETEND_CUDA_GIB"]) * GIB)
    for replaced in (DEVICES, MEMORY, STREAMS, RANDOM):
        for name, value in replaced.items():
            setattr(torch.cuda, name, value)
            if hasattr(torch.cuda.memory, name):
                setattr(torch.cuda.memory, name, value)
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    torch._C._cuda_getCurrentRawStream = lambda index: current_stream(index).stream_id
    torch.distributed.ProcessGroupNCCL = ProcessGroupNCCL  # type: ignore[attr-defined, misc, assignment]
    # bitsandbytes would load its CUDA kernels; the library has registered the CPU's instead.
    sys.modules["bitsandbytes.backends.cuda.ops"] = ModuleType("bitsandbytes.backends.cuda.ops")


def visible_cards() -> list[str]:
    """Returns the numbers of the cards that this process sees, in its order."""
    cards = [str(number) for number in range(int(os.environ["PRETEND_CUDA_GPUS"]))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return cards if visible is None else [name for name in visible.split(",") if name in cards]


def properties(device: Any = None) -> SimpleNamespace:
    index = index_of(device)
    return SimpleNamespace(
        name="Pretended GPU",
        total_memory=native.memory(index)["total"],
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=1,
        warp_size=32,
        is_integrated=False,
        uuid=f"00000000-0000-0000-0000-{int(native.card(index)):012d}",
    )


def of_memory(key: str) -> Any:
    return lambda device=None: native.memory(index_of(device))[key]


def memory_info(device: Any = None) -> tuple[int, int]:
    memory = native.memory(index_of(device))
    return memory["total"] - memory["reserved"], memory["total"]


def memory_stats(device: Any = None) -> dict[str, int]:
    memory = native.memory(index_of(device))
    return {
        f"{kind}_bytes.all.{when}": memory[key]
        for kind in ("active", "allocated")
        for when, key in (("current", "allocated"), ("peak", "peak_allocated"))
    }


DEVICES = {
    "_lazy_init": lambda: None,
    "_is_compiled": lambda: True,
    "is_available": lambda: native.num_devices() > 0,
    "is_initialized": lambda: True,
    "device_count": lambda: native.num_devices(),
    "device": Device,
    "current_device": index_of,
    "set_device": lambda device: torch._C._accelerator_setDeviceIndex(index_of(device)),
    "get_device_properties": properties,
    "get_device_name": lambda device=None: properties(device).name,
    "get_device_capability": lambda device=None: CAPABILITY,
    "is_bf16_supported": lambda *_, **__: True,
    "can_device_access_peer": lambda *_: True,
    "synchronize": lambda device=None: torch._C._accelerator_synchronizeDevice(index_of(device)),
    "ipc_collect": lambda: None,
}
MEMORY = {
    "empty_cache": lambda: native.empty_cache(),
    "memory_allocated": of_memory("allocated"),
    "max_memory_allocated": of_memory("peak_allocated"),
    "memory_reserved": of_memory("reserved"),
    "max_memory_reserved": of_memory("peak_reserved"),
    "reset_peak_memory_stats": lambda device=None: native.reset_peaks(index_of(device)),
    "memory_stats": memory_stats,
    "mem_get_info": memory_info,
    "set_per_process_memory_fraction": lambda fraction, device=None: native.set_fraction(
        index_of(device), fraction
    ),
}
STREAMS = {
    "Stream": Stream,
    "Event": Event,
    "stream": StreamContext,
    "StreamContext": StreamContext,
    "current_stream": current_stream,
    "default_stream": default_stream,
    "set_stream": set_stream,
    "is_current_stream_capturing": lambda: False,
    "_sleep": lambda cycles: None,
}
RANDOM = {
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
}
"""Random numbers of the device come from the CPU's generator."""
