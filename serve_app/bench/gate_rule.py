"""Decides whether a figure of the gate fails: because it is absent, beyond a static limit, or has regressed.

A figure has regressed if it is worse than the median of the last runs by more than both a relative and an absolute
limit. For a small figure, a large relative change may be noise; for a large figure, a large absolute one.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NUM_RUNS = 5
"""Number of most recent runs with the same fingerprint whose median counts."""


@dataclass(frozen=True)
class Limit:
    """The limits of one figure."""

    better: Literal["higher", "lower"]
    worst: float
    """The static limit, which holds on any machine."""
    relative: float
    absolute: float

    def is_worse(self, value: float, than: float) -> bool:
        return value < than if self.better == "higher" else value > than


def find_fault(value: float | None, limit: Limit, earlier: Sequence[float]) -> str | None:
    """Returns why the figure fails, or None. earlier: values in runs with the same fingerprint, oldest first."""
    if value is None:
        return "was not measured"
    if not math.isfinite(value):
        return f"is {value}"
    if limit.is_worse(value, limit.worst):
        wanted = "at least" if limit.better == "higher" else "at most"
        return f"is {value:.3g}, but must be {wanted} {limit.worst:g}"
    last = earlier[-NUM_RUNS:]
    median = statistics.median(last) if last else value
    change = abs(value - median)
    if limit.is_worse(value, median) and change > limit.absolute and change > limit.relative * abs(median):
        limits = f"{limit.absolute:g} and {limit.relative:.0%}"
        return f"is {value:.3g}, worse by more than {limits} than the median of {len(last)} runs, {median:.3g}"
    return None


def better_of(one: float | None, other: float | None, limit: Limit) -> float | None:
    """Returns the better of two measurements of a figure. One that is None, infinite or NaN loses to a number."""
    numbers = [value for value in (one, other) if value is not None and math.isfinite(value)]
    if not numbers:
        return one
    return max(numbers) if limit.better == "higher" else min(numbers)
