"""What the calls of a stage need of its share: foreseen before the first, measured once they have run on CUDA."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from deployments.memory.limit import Limit, gib
from deployments.refusal import NeverFits
from deployments.stats import NeedStats

Foresee = Callable[[], tuple[int, int]]
"""(bytes of weights on the device, bytes of tensors that one call has besides)"""


@dataclass(frozen=True, eq=False)
class Need:
    """Of one kind of call: all calls of a kind have the same shapes."""

    label: str
    weights_bytes: int
    working_bytes: int
    """Foreseen, of one call."""
    measured: dict[int, int] = field(default_factory=dict)
    """Bytes of weights and tensors, by how many calls were merged."""

    def num_bytes(self, num_calls: int) -> int:
        """Of so many merged: from the nearest measurement up, each more by what is foreseen of one."""
        nearest = max((number for number in self.measured if number <= num_calls), default=0)
        return self.measured.get(nearest, self.weights_bytes) + (num_calls - nearest) * self.working_bytes

    def stats(self) -> tuple[NeedStats, ...]:
        foreseen = NeedStats(self.label, 1, self.num_bytes(1), is_measured=False)
        measured = [NeedStats(self.label, n, size, is_measured=True) for n, size in sorted(self.measured.items())]
        return tuple(measured) if 1 in self.measured else (foreseen, *measured)


class Needs:
    """Of one process. Thread-safe; costs nothing where it has no limit."""

    def __init__(self, limit: Limit | None, device: torch.device) -> None:
        self._limit, self._device = limit, device
        self._needs: dict[Hashable, Need] = {}
        self._foreseeing = threading.Lock()
        self._peaks = (0, 0)

    @property
    def is_limited(self) -> bool:
        return self._limit is not None

    def at_most(self, kind: Hashable, label: str, foresee: Foresee, *, up_to: int = 1) -> int | None:
        """How many calls of this kind, of `up_to`, fit at once; None: no limit. Raises NeverFits if not one does.

        foresee takes up to seconds, once per kind: call this from a thread.
        """
        limit = self._limit
        if limit is None:
            return None
        need = self._needs.get(kind)
        if need is None:
            with self._foreseeing:
                need = self._needs.get(kind) or Need(label, *foresee())
                self._needs[kind] = need
        if need.num_bytes(1) > limit.num_bytes:
            raise NeverFits(
                f"{label} needs {gib(need.num_bytes(1))}, {gib(need.weights_bytes)} of it weights, and the stage "
                f"has {gib(limit.num_bytes)} ({limit.reason}): ask for less"
            )
        return max(number for number in range(1, up_to + 1) if need.num_bytes(number) <= limit.num_bytes)

    @contextmanager
    def measured(self, kind: Hashable, num_calls: int = 1) -> Iterator[None]:
        """Around merged calls of a kind that was admitted. On CUDA their peak replaces what was foreseen."""
        need = self._needs.get(kind)
        if need is None or self._device.type != "cuda":
            yield
            return
        self._peaks = self.peaks()
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        peak_bytes = torch.cuda.max_memory_allocated(self._device)
        need.measured[num_calls] = max(peak_bytes, need.measured.get(num_calls, 0))

    def peaks(self) -> tuple[int, int]:
        """(allocated, reserved) at most on CUDA since the start of the process."""
        allocated, reserved = self._peaks
        return (
            max(allocated, torch.cuda.max_memory_allocated(self._device)),
            max(reserved, torch.cuda.max_memory_reserved(self._device)),
        )

    def stats(self) -> tuple[NeedStats, ...]:
        return tuple(stats for need in list(self._needs.values()) for stats in need.stats())
