"""Finds the processes of this process's Ray, by their titles."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import find_descendants
from serve_app.bench.report import Row
from serve_app.config.serve_file import APP_NAME

TITLES = {
    "encoder": "ray::ServeReplica:{app}:Encoder",
    "rank 0": "ray::ServeReplica:{app}:Transformer",
    "rank 1": "ray::Rank",
    "VAE": "ray::ServeReplica:{app}:Vae",
    "ingress": "ray::ServeReplica:{app}:Ingress",
    "HTTP proxy": "ray::ProxyActor",
    "Serve controller": "ray::ServeController",
}
"""Starts of the processes' command lines."""
SHARED_MEMORY = Path("/dev/shm")


def find_processes(app: str = APP_NAME) -> dict[str, list[int]]:
    """Returns process IDs by the names in TITLES, oldest first. Finds descendants of this process only."""
    found: dict[str, list[int]] = {name: [] for name in TITLES}
    for pid in sorted(find_descendants()):
        title = _read(pid, "cmdline").replace("\0", " ")
        for name, start in TITLES.items():
            if title.startswith(start.format(app=app)):
                found[name].append(pid)
    return found


def count_zombies() -> int:
    """Counts all zombies on the machine, whoever's they are, since orphans become children of process 1."""
    return sum(_status(pid)[0] == "Z" for pid in _all_pids())


@dataclass(frozen=True)
class LeakedResources:
    """What dead processes have left behind: zombies and shared memory."""

    zombies: int
    shm_bytes: int

    @classmethod
    def now(cls) -> "LeakedResources":
        return cls(count_zombies(), shared_memory_bytes())

    def since(self) -> Row:
        """Returns what has been left behind since this was taken."""
        now = LeakedResources.now()
        return {
            "zombies": max(0, now.zombies - self.zombies),
            "shm_bytes": max(0, now.shm_bytes - self.shm_bytes),
        }


@dataclass(frozen=True)
class Work:
    """A process's title, its start by CLOCK_BOOTTIME, and its processor time."""

    title: str
    begun_s: float
    cpu_s: float


def find_work() -> dict[int, Work]:
    """Returns the work by process ID, for descendants of this process only."""
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
    """Returns the size of all files in /dev/shm, including Ray's object store."""
    return sum(path.stat().st_size for path in SHARED_MEMORY.iterdir() if path.is_file())


def _all_pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _status(pid: int) -> tuple[str, str]:
    """Returns state and parent of a process; empty strings if there is no such process."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (fields[0], fields[1]) if fields else ("", "")


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
