"""Measures what Ray's processes hold: private memory, threads, open files; and the objects in the object store."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.internal_api import memory_summary

from serve_app.bench.processes import find_processes
from serve_app.bench.report import Row

PROC = Path("/proc")
MIB = 2**20


@dataclass(frozen=True)
class Holding:
    """What one process holds."""

    memory_mib: float
    """Anonymous pages, such as the heap; without mapped files and shared memory."""
    num_threads: int
    num_files: int


def hold(pid: int) -> Holding:
    """Measures one process. Raises OSError if it has ended."""
    process = PROC / str(pid)
    anonymous_kib = _number("Anonymous", (process / "smaps_rollup").read_text())
    threads = _number("Threads", (process / "status").read_text())
    return Holding(anonymous_kib / 1024, threads, len(os.listdir(process / "fd")))


def hold_all(app: str) -> dict[str, Holding]:
    """Measures every process that serves the app, by its name; of several with one name, the second ends in 2."""
    found = {}
    for name, pids in find_processes(app).items():
        for i, pid in enumerate(pids):
            found[name if i == 0 else f"{name} {i + 1}"] = hold(pid)
    return found


def count_objects() -> int:
    """Counts the objects in the object stores of all nodes."""
    told = re.search(r"(\d+) objects", memory_summary(ray.get_runtime_context().gcs_address, stats_only=True))
    if told is None:
        raise ValueError("this version of Ray does not report the number of objects")
    return int(told[1])


def _number(name: str, text: str) -> int:
    told = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return 0 if told is None else int(told[1])  # a zombie has no such line


@dataclass(frozen=True)
class Sample:
    """What all processes held when num_requests requests had ended."""

    num_requests: int
    holdings: Mapping[str, Holding]


def growth(samples: Sequence[Sample], idle: tuple[Mapping[str, Holding], Mapping[str, Holding]]) -> list[Row]:
    """Returns a row for each process: first and last MiB, the slope, and its threads and files when idle.

    idle: what each process held when idle, before and after the load.
    """
    before, after = idle
    return [
        {
            "process": name,
            "mib": samples[0].holdings[name].memory_mib,
            "mib_at_last": samples[-1].holdings[name].memory_mib,
            "mib_per_1000": 1000 * slope([(s.num_requests, s.holdings[name].memory_mib) for s in samples]),
            "threads": before[name].num_threads,
            "threads_after": after[name].num_threads,
            "files": before[name].num_files,
            "files_after": after[name].num_files,
        }
        for name in before.keys() & after.keys()
        if all(name in sample.holdings for sample in samples)
    ]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the least-squares line through the points; 0 for one point."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
