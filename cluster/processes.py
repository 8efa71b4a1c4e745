"""The processes that come of this one, as Linux tells them: who ends them must find them all."""

import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")


def find_descendants(of: int | None = None) -> set[int]:
    """Children of that process, or of this one, their children and so on; none where there is no /proc."""
    children: dict[int, list[int]] = defaultdict(list)
    for process in PROC.glob("[0-9]*") if PROC.is_dir() else ():
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state, parent.
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            children[parent].append(int(process.name))
    found: set[int] = set()
    waiting = [of or os.getpid()]
    while waiting:
        new = children[waiting.pop()]
        found.update(new)
        waiting += new
    return found


def kill_all(processes: Iterable[int]) -> None:
    """Those that are still there."""
    for pid in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
