"""Workers that are forked, without Ray: any file is a worker to whoever forks it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.forked_worker import FORK_SERVER, PRELOAD

PROGRAM = """
import json, os, sys
told = {"argv": sys.argv, "folder": os.getcwd(), "mark": os.environ["MARK"], "pid": os.getpid(), "group": os.getpgrp(),
        "parent": os.getppid(), "preloaded": "colorsys" in sys.modules, "threads": len(os.listdir("/proc/self/task"))}
print(json.dumps(told), flush=True)
if sys.argv[-1] == "stay":
    sys.stdin.read()
sys.exit(7)
"""
PRELOADED = "tests.cluster.test_fork_server:import_something"


def import_something() -> None:
    """A module that nothing else imports."""
    import colorsys  # noqa: F401


class Asker:
    """A process that Ray would start."""

    def __init__(self, file: Path, *args: str, mark: str = "", raylet: int, preload: str = PRELOADED) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.forked_worker", str(file), *args],
            env=os.environ
            | {"MARK": mark, "RAY_RAYLET_PID": str(raylet), FORK_SERVER: preload, PRELOAD: json.dumps([preload])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        ...
