"""The processes that come of this one, as Linux tells them: who ends them must find them all."""

import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
_RAYLET = b"RAY_RAYLET_PID="


def find_descendants(of: int | None = None) -> set[int]:
    """Children of that process, or of this one, their children and so on; none where there is no /proc.

    With those that came of a raylet among them, whoever's children they are by now: a fork server outlives the
    worker that started it, and its workers are its children.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for process in PROC.glob("[0-9]*") if PROC.is_dir() else ():
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state, parent.
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
    """The raylet for which it was started, as its environment then said."""
    with contextlib.suppress(OSError, ValueError):
        for variable in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
            if variable.startswith(_RAYLET):
                return int(variable.removeprefix(_RAYLET))
    return None


def kill_all(processes: Iterable[int]) -> None:
    """Those that are still there."""
    for pid in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
