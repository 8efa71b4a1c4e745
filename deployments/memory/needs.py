"""What the calls of a stage need of its share: foreseen before the first, measured once they have run on a GPU."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from cluster import accelerator
from deployments.memory.limit import WORKSPACE_BYTES, Limit, gib
from deployments.refusal import NeverFits, OutOfShare
from deployments.stats import NeedStats

Foresee = Callable[[], tuple[int, int]]
"""(bytes of weights on the device, bytes of tensors that one call has besides)"""


@dataclass(frozen=True)
class Kept:
    """Bytes that requests keep on the device between their calls."""

    own: int = 0
    """By the request whose call it is."""
    all: int = 0
    """By it and the others."""


NOTHING_KEPT = Kept()


@dataclass(frozen=True, eq=False)
class Need:
    """Of one kind of call: all calls of a kind have the same shapes."""

    label: str
    weights_bytes: int
    working_bytes: int
    """Foreseen, of one call."""
    reserve_bytes: int = 0
    """Of torch's own, where nothing was measured yet."""
    measured: dict[int, int] = field(default_factory=dict)
    """Bytes of weights and tensors, by how many calls were merged."""

    def num_bytes(self, num_calls: int) -> int:
        """Of so many merged: from the nearest measurement up, each more by what is foreseen of one."""
        measured = {0: self.weights_bytes + self.reserve_bytes} | self.measured.copy()
        nearest = max(number for number in measured if number <= num_calls)
        return measured[nearest] + (num_calls - nearest) * self.working_bytes

    def stats(self) -> tuple[NeedStats, ...]:
        foreseen = NeedStats(self.label, 1, self.num_bytes(1), is_measured=False)
        found = sorted(self.measured.copy().items())
        measured = tuple(NeedStats(self.label, number, size, is_measured=True) for number, size in found)
        return measured if 1 in self.measured else (foreseen, *measured)


class Needs:
    """Of one process. Thread-safe; costs nothing where it has no limit."""

    def __init__(self, limit: Limit | None, device: torch.device) -> None:
        self._limit, self._device = limit, device
        self._needs: dict[Hashable, Need] = {}
        self._foreseeing = threading.Lock()
        self._reserve_bytes = WORKSPACE_BYTES if accelerator.is_accelerator(device) else 0
        self._peaks = (0, 0)

    @property
    def is_limited(self) -> bool:
        return self._limit is not None

    def at_most(
        self, kind: Hashable, label: str, foresee: Foresee, *, up_to: int = 1, kept: Kept = NOTHING_KEPT
    ) -> int | None:
        """How many calls of this kind, of `up_to`, fit at once; None: no limit. Raises NeverFits if not one does,
        beside what its request keeps. One always may, beside what others do: they will have done.

        foresee takes up to seconds, once per kind: call this from a thread.
        """
        limit = self._limit
        if limit is None:
            return None
        need = self._needs.get(kind)
        if need is None:
            with self._foreseeing:
                need = self._needs.get(kind) or Need(label, *foresee(), self._reserve_bytes)
                self._needs[kind] = need
        if need.num_bytes(1) + kept.own > limit.num_bytes:
            beside = f" and {gib(kept.own)} for its step cache," if kept.own else ""
            raise NeverFits(
                f"{label} needs {gib(need.num_bytes(1))}, {gib(need.weights_bytes)} of it weights,{beside} and "
                f"the stage has {gib(limit.num_bytes)} ({limit.reason}): ask for less"
            )
        room = limit.num_bytes - kept.all
        return max((number for number in range(1, up_to + 1) if need.num_bytes(number) <= room), default=1)

    @contextmanager
    def measured(self, kind: Hashable, num_calls: int = 1, *, kept_bytes: int = 0) -> Iterator[None]:
        """Around merged calls of a kind that was admitted. On a GPU their peak replaces what was foreseen.

        kept_bytes: on the device meanwhile, that are not of these calls.

        Of calls that ran out of memory so many are not merged again. What has fitted, fits: a peak above the
        limit, where nothing enforces that, is no reason to refuse the same call the next time.
        """
        need, limit = self._needs.get(kind), self._limit
        if need is None or limit is None:
            yield
            return
        is_on_gpu = accelerator.is_accelerator(self._device)
        if is_on_gpu:
            self._peaks = self.peaks()
            accelerator.reset_peaks(self._device)
        try:
            yield
        except OutOfShare:
            if num_calls > 1:
                need.measured[num_calls] = limit.num_bytes + 1
            raise
        if is_on_gpu:
            peak_bytes = min(accelerator.peak_bytes(self._device)[0] - kept_bytes, limit.num_bytes)
            need.measured[num_calls] = max(peak_bytes, need.measured.get(num_calls, 0))

    def peaks(self) -> tuple[int, int]:
        """(allocated, reserved) at most on the GPU since the start of the process."""
        allocated, reserved = map(max, self._peaks, accelerator.peak_bytes(self._device))
        return allocated, reserved

    def stats(self) -> tuple[NeedStats, ...]:
        return tuple(stats for need in list(self._needs.values()) for stats in need.stats())
