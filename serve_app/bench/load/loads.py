"""Turns options into runs: closed loops, open loops, or a trace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.bench.load.workload import Ask, WorkloadFault, read_trace, with_arrivals


@dataclass(frozen=True)
class Load:
    """One run: its requests and their concurrency."""

    name: str
    asks: Sequence[Ask]
    max_concurrency: int | None
    """Number of clients if the asks have no times; otherwise the limit on requests at once, None: no limit."""

    @property
    def is_open(self) -> bool:
        return self.asks[0].at_s is not None


def plan_loads(
    plan: Callable[[int], list[Ask]],
    *,
    max_concurrency: Sequence[int],
    request_rate: Sequence[float],
    burstiness: float,
    trace: Path | None,
    seed: int,
) -> list[Load]:
    """Returns the runs. Raises WorkloadFault.

    plan: returns the asks, without times, of the run with a given number.
    """
    if trace is None and not request_rate:
        return [Load(f"{level} at once", plan(i), level) for i, level in enumerate(max_concurrency)]
    if len(max_concurrency) > 1 or (trace is not None and request_rate):
        raise WorkloadFault("give only one of --trace and --request-rate, with at most one --max-concurrency")
    limit = max_concurrency[0] if max_concurrency else None
    if trace is not None:
        return [Load(trace.stem, read_trace(trace), limit)]
    return [
        Load(f"{rate:g}/s", with_arrivals(plan(i), rate, burstiness, seed + i), limit)
        for i, rate in enumerate(request_rate)
    ]


def read_numbers(text: str | None, option: str) -> list[float]:
    """Reads numbers above 0, separated by commas. Raises WorkloadFault."""
    try:
        values = [float(each) for each in (text or "").split(",") if each]
    except ValueError:
        raise WorkloadFault(f"{option} {text!r}: must be numbers, separated by commas") from None
    if not all(0 < value < float("inf") for value in values):
        raise WorkloadFault(f"{option} {text!r}: numbers must be finite and above 0")
    return values


def read_counts(text: str | None, option: str) -> list[int]:
    """Reads whole numbers above 0, separated by commas. Raises WorkloadFault."""
    values = read_numbers(text, option)
    if any(value != int(value) for value in values):
        raise WorkloadFault(f"{option} {text!r}: must be whole numbers")
    return list(map(int, values))


def read_goodput(text: str) -> float:
    """Reads the milliseconds from `e2el:1500`, the spelling of vLLM's benchmark. Raises WorkloadFault."""
    name, _, value = text.partition(":")
    numbers = read_numbers(value, "--goodput")
    if name != "e2el" or len(numbers) != 1:
        raise WorkloadFault(
            f"--goodput {text!r}: must be e2el:MILLISECONDS, the time until the whole answer has come"
        )
    return numbers[0]
