"""The processes that a Ray of this process consists of, by what they call themselves."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import find_descendants
from serve_app.bench.report import Row

TITLES = {
    "encoder": "ray::ServeReplica:relay:Encoder",
    "rank 0": "ray::ServeReplica:relay:Transformer",
    "rank 1": "ray::Rank",
    "VAE": "ray::ServeReplica:relay:Vae",
    "ingress": "ray::ServeReplica:relay:Ingress",
    "HTTP proxy": "ray::ProxyActor",
    "Serve controller": "ray::ServeController",
}
"""How the command lines begin; of two shards each."""
SHARED_MEMORY = Path("/dev/shm")


def find_processes() -> dict[str, list[int]]:
    """Process ids by the names above, the oldest first; descendants of this process only."""
    found: dict[str, list[int]] = {name: [] for name in TITLES}
    for pid in sorted(find_descendants()):
        title = _read(pid, "cmdline").replace("\0", " ")
        for name, start in TITLES.items():
            if title.startswith(start):
                found[name].append(pid)
    return found


def count_zombies() -> int:
    """Processes of anybody that have ended and are not reaped; orphans are the child of the machine's first."""
    return sum(_status(pid)[0] == "Z" for pid in _all_pids())


@dataclass(frozen=True)
class Leavings:
    """What processes leave behind that nobody clears away."""

    zombies: int
    shm_bytes: int

    @classmethod
    def now(cls) -> "Leavings":
        return cls(count_zombies(), shared_memory_bytes())

    def since(self) -> Row:
        """What is there now that was not."""
        now = Leavings.now()
        return {
            "zombies": max(0, now.zombies - self.zombies),
            "shm_bytes": max(0, now.shm_bytes - self.shm_bytes),
        }


@dataclass(frozen=True)
class Work:
    """What a process calls itself, when it began, by CLOCK_BOOTTIME, and for how long it has computed."""

    title: str
    begun_s: float
    cpu_s: float


def find_work() -> dict[int, Work]:
    """By process; descendants of this process only."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    found = {}
    for pid in find_descendants():
        title, fields = _read(pid, "cmdline").replace("\0", " "), _read(pid, "stat").rpartition(")")[2].split()
        if fields:
            user, system, begun = (int(fields[i]) * tick_s for i in (11, 12, 19))
            found[pid] = Work(title, begun, user + system)
    return found


def is_alive(pid: int) -> bool:
    return _status(pid)[0] not in ("Z", "")


def shared_memory_bytes() -> int:
    """Of all files there, Ray's object store included."""
    return sum(path.stat().st_size for path in SHARED_MEMORY.iterdir() if path.is_file())


def _all_pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _status(pid: int) -> tuple[str, str]:
    """State and parent of a process; empty if there is no such."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (fields[0], fields[1]) if fields else ("", "")


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
