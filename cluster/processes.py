"""Finds and kills the descendants of a process, by Linux's /proc."""

import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
_RAYLET = b"RAY_RAYLET_PID="


def find_descendants(of: int | None = None) -> set[int]:
    """Returns all descendants of the process `of`, by default of this one; none where there is no /proc.

    For each raylet among them, also returns the processes started for it, whatever their parent is: a fork server
    outlives the worker that started it, and its workers are its children.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for process in PROC.glob("[0-9]*") if PROC.is_dir() else ():
        with contextlib.suppress(OSError):
            # The name may contain any character; state and parent follow it.
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            children[parent].append(int(process.name))
    found: set[int] = set()
    waiting = [of or os.getpid()]
    while waiting:
        while waiting:
            new = children[waiting.pop()]
            found.update(new)
            waiting += new
        others = {pid for family in children.values() for pid in family} - found
        waiting = [pid for pid in others if _raylet_of(pid) in found]
        found.update(waiting)
    return found


def _raylet_of(pid: int) -> int | None:
    """Returns the raylet for which the process was started, by the environment it was started with."""
    with contextlib.suppress(OSError, ValueError):
        for variable in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
            if variable.startswith(_RAYLET):
                return int(variable.removeprefix(_RAYLET))
    return None


def kill_all(processes: Iterable[int]) -> None:
    """Kills the processes that still exist."""
    for pid in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
