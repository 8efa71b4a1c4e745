"""`relay serve` in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
RELAY = str(Path(sys.executable).with_name("relay"))
QUICKSTART = (ROOT / "configs" / "quickstart.yaml").read_text()
ENV = os.environ | {"RAY_ADDRESS": "local", "NO_COLOR": "1", "COLUMNS": "80"}


@contextmanager
def serving(
    config: Path, log: Path, *options: str, relay: str = RELAY, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a process of `relay serve`, and kills it and all that it has started at the end."""
    command = [relay, "serve", str(config), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=cwd, env=ENV, stdout=out, stderr=out)
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(log: Path, text: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 240
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline
        time.sleep(0.3)


def left_over(processes: list[psutil.Process], *, after_s: float = 15) -> list[psutil.Process]:
    """Returns the processes that still exist, without those that have ended and that only init can reap."""
    _, left = psutil.wait_procs(processes, timeout=after_s)
    return [each for each in left if not _is_inits(each)]


def _is_inits(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE and process.ppid() == 1)
    except psutil.NoSuchProcess:
        return True
