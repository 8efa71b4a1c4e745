"""Admission by memory: the need of a stage's calls is estimated, then measured once they have run on a GPU."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from cluster.machines import accelerator
from deployments.errors import ExceedsMemory, OutOfDeviceMemory
from deployments.memory.limit import WORKSPACE_BYTES, Limit, gib
from deployments.memory.stats import MemoryEstimateStats

EstimateMemory = Callable[[], tuple[int, int]]
"""Returns (bytes of weights on the device, bytes of other tensors of one call)."""


@dataclass(frozen=True)
class Retained:
    """Bytes that requests keep on the device between their calls."""

    own: int = 0
    """Kept by the request that makes the call."""
    all: int = 0
    """Kept by all requests, including that one."""


NOTHING_RETAINED = Retained()


@dataclass(frozen=True, eq=False)
class MemoryEstimate:
    """The memory that one kind of call needs; all calls of a kind have the same shapes."""

    label: str
    weights_bytes: int
    working_bytes: int
    """Estimated bytes of one call's tensors besides weights."""
    reserve_bytes: int = 0
    """Bytes for torch's own workspaces, added while nothing has been measured."""
    measured: dict[int, int] = field(default_factory=dict)
    """Measured bytes of weights and tensors, by the number of calls that were merged."""

    def num_bytes(self, num_calls: int) -> int:
        """Returns the bytes for this many merged calls: those measured for the nearest smaller or equal number,
        plus `working_bytes` for each further call."""
        measured = {0: self.weights_bytes + self.reserve_bytes} | self.measured.copy()
        nearest = max(number for number in measured if number <= num_calls)
        return measured[nearest] + (num_calls - nearest) * self.working_bytes

    def stats(self) -> tuple[MemoryEstimateStats, ...]:
        estimated = MemoryEstimateStats(self.label, 1, self.num_bytes(1), is_measured=False)
        found = sorted(self.measured.copy().items())
        measured = tuple(MemoryEstimateStats(self.label, number, size, is_measured=True) for number, size in found)
        return measured if 1 in self.measured else (estimated, *measured)


class MemoryAdmission:
    """Memory admission of one process. Thread-safe. Does nothing if there is no limit."""

    def __init__(self, limit: Limit | None, device: torch.device) -> None:
        self._limit, self._device = limit, device
        self._estimates: dict[Hashable, MemoryEstimate] = {}
        self._estimating = threading.Lock()
        self._reserve_bytes = WORKSPACE_BYTES if accelerator.is_accelerator(device) else 0
        self._peaks = (0, 0)

    @property
    def is_limited(self) -> bool:
        return self._limit is not None

    def max_admissible(
        self,
        kind: Hashable,
        label: str,
        estimate_memory: EstimateMemory,
        *,
        up_to: int = 1,
        retained: Retained = NOTHING_RETAINED,
    ) -> int | None:
        """Returns how many calls of this kind, at most `up_to`, fit at once; None if there is no limit.

        Raises ExceedsMemory if a single call does not fit beside what its own request retains. Otherwise the
        result is at least 1, even if other requests retain too much for it, because they will free that.

        Calls estimate_memory once per kind, which takes up to seconds: call this from a thread.
        """
        limit = self._limit
        if limit is None:
            return None
        estimate = self._estimates.get(kind)
        if estimate is None:
            with self._estimating:
                estimate = self._estimates.get(kind) or MemoryEstimate(
                    label, *estimate_memory(), self._reserve_bytes
                )
                self._estimates[kind] = estimate
        if estimate.num_bytes(1) + retained.own > limit.num_bytes:
            beside = f", and {gib(retained.own)} for its step cache" if retained.own else ""
            raise ExceedsMemory(
                f"{label} needs {gib(estimate.num_bytes(1))} ({gib(estimate.weights_bytes)} of it weights)"
                f"{beside}, but the stage has {gib(limit.num_bytes)} ({limit.reason}): ask for less"
            )
        room = limit.num_bytes - retained.all
        return max((number for number in range(1, up_to + 1) if estimate.num_bytes(number) <= room), default=1)

    @contextmanager
    def measured(self, kind: Hashable, num_calls: int = 1, *, retained_bytes: int = 0) -> Iterator[None]:
        """Context around merged calls of an admitted kind. On a GPU their measured peak replaces the estimate.

        retained_bytes: bytes on the device meanwhile that do not belong to these calls.

        If merged calls run out of memory, that many are not merged again. A peak is recorded as at most the limit:
        where nothing enforces the limit, calls that exceeded it and succeeded must not be refused the next time.
        """
        estimate, limit = self._estimates.get(kind), self._limit
        if estimate is None or limit is None:
            yield
            return
        is_on_gpu = accelerator.is_accelerator(self._device)
        if is_on_gpu:
            self._peaks = self.peaks()
            accelerator.reset_peaks(self._device)
        try:
            yield
        except OutOfDeviceMemory:
            if num_calls > 1:
                estimate.measured[num_calls] = limit.num_bytes + 1
            raise
        if is_on_gpu:
            peak_bytes = min(accelerator.peak_bytes(self._device)[0] - retained_bytes, limit.num_bytes)
            estimate.measured[num_calls] = max(peak_bytes, estimate.measured.get(num_calls, 0))

    def peaks(self) -> tuple[int, int]:
        """Returns the peak bytes (allocated, reserved) on the GPU since the start of the process."""
        allocated, reserved = map(max, self._peaks, accelerator.peak_bytes(self._device))
        return allocated, reserved

    def stats(self) -> tuple[MemoryEstimateStats, ...]:
        return tuple(stats for estimate in list(self._estimates.values()) for stats in estimate.stats())
