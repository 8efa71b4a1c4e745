"""Tests that a lease's holder is alone on the device, and that no process waits for long, or for a dead one."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.machines.device_lease import PERIOD_S, DeviceLease

PATIENCE_S = 20.0
WORKER = """
import sys, time
from pathlib import Path
from cluster.machines.device_lease import DeviceLease

folder, name, num_works, work_s, time_slice_s, is_busy = sys.argv[1:]
log = (Path(folder) / f"{name}.log").open("a", buffering=1)
tell = lambda word: print(word, time.monotonic(), file=log)
lease = DeviceLease(
    Path(folder) / "device",
    load=lambda: tell("load"),
    unload=lambda: tell("unload"),
    time_slice_s=float(time_slice_s),
)
for _ in range(int(num_works)):
    with lease.held():
        tell("work")
        time.sleep(float(work_s))
    if is_busy == "no":
        lease.idle()
        time.sleep(0.03)
lease.idle()
tell("done")
time.sleep(60)
"""


class Workers:
    """Processes that share one device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self, name: str, *, works: int, work_s: float, time_slice_s: float = 60.0, is_busy: bool = False
    ) -> None:
        words = [self.folder, name, works, work_s, time_slice_s, "yes" if is_busy else "no"]
        command = [sys.executable, "-c", WORKER, *map(str, words)]
        self.processes[name] = subprocess.Popen(command, cwd=Path(__file__).parents[3])

    def told(self, name: str, word: str) -> list[float]:
        """Returns the times at which the process logged this word."""
        log = self.folder / f"{name}.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [float(line.split()[1]) for line in lines if line.split()[0] == word and len(line.split()) == 2]

    def wait_for(self, name: str, word: str, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(self.told(name, word)) < times:
            assert time.monotonic() < deadline, f"{name} never told {word!r} {times} times"
            time.sleep(0.005)

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(tmp_path)
    yield workers
    for process in workers.processes.values():
        process.kill()
        process.wait()


def test_no_two_processes_are_on_the_device_at_once_and_all_get_done(workers: Workers) -> None:
    names = ("a", "b", "c")
    for name in names:
        workers.start(name, works=8, work_s=0.01)
    for name in names:
        workers.wait_for(name, "done")
    stays = []
    for name in names:
        arrivals, departures = workers.told(name, "load"), workers.told(name, "unload")
        stays += list(zip(arrivals, [*departures, float("inf")], strict=False))
    assert len(stays) >= 3
    for (_, left), (arrived, _) in pairwise(sorted(stays)):
        assert left <= arrived


def test_who_is_killed_while_holding_it_keeps_nobody_waiting(workers: Workers) -> None:
    workers.start("victim", works=1, work_s=60)
    workers.wait_for("victim", "work")
    workers.start("next", works=1, work_s=0)
    time.sleep(0.3)  # the worker is waiting, or still starting
    assert not workers.told("next", "work")
    workers.kill("victim")
    workers.wait_for("next", "done")


def test_who_has_work_without_end_gives_way_after_its_time_and_comes_back(workers: Workers) -> None:
    workers.start("busy", works=10**6, work_s=0.005, time_slice_s=0.1, is_busy=True)
    workers.wait_for("busy", "work")
    workers.start("other", works=3, work_s=0.005)
    workers.wait_for("other", "done")
    [*_, last] = workers.told("busy", "unload")
    workers.wait_for("busy", "load", len(workers.told("busy", "unload")) + 1)
    assert workers.told("busy", "load")[-1] > last


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device"


def test_while_nobody_asks_the_lease_stays_and_costs_next_to_nothing(path: Path) -> None:
    lease = DeviceLease(path, time_slice_s=0.0)
    began = time.monotonic()
    for _ in range(1000):
        with lease.held():
            pass
        lease.idle()
    assert time.monotonic() - began < 0.5
    time.sleep(3 * PERIOD_S)
    assert (lease.stats().num_leases, lease.stats().is_held) == (1, True)


def test_who_is_idle_gives_way_to_who_asks(path: Path) -> None:
    """Two descriptors of one file exclude each other as two processes do."""
    one, other = DeviceLease(path, time_slice_s=60), DeviceLease(path, time_slice_s=60)
    with one.held():
        pass
    one.idle()
    with other.held():
        assert not one.stats().is_held
    assert other.stats().waited_s < 1


def test_works_that_follow_at_once_are_one_lease(path: Path) -> None:
    """A queue's worker is idle only for a moment between two requests, so it does not give way."""
    lease, other = DeviceLease(path, time_slice_s=60), DeviceLease(path)
    done = threading.Event()

    def wait() -> None:
        with other.held():
            done.set()

    with lease.held():
        threading.Thread(target=wait, daemon=True).start()
        time.sleep(5 * PERIOD_S)
    for _ in range(5):
        lease.idle()
        with lease.held():
            time.sleep(2 * PERIOD_S)
    assert lease.stats().num_leases == 1
    assert not done.is_set()
    lease.idle()
    assert done.wait(PATIENCE_S)


def test_what_fails_to_load_leaves_the_lease_to_others(path: Path) -> None:
    events: list[str] = []

    def fail() -> None:
        raise MemoryError("no room")

    lease = DeviceLease(path, load=fail, unload=lambda: events.append("left"))
    with pytest.raises(MemoryError), lease.held():
        events.append("worked")
    assert events == ["left"]
    with DeviceLease(path).held():
        pass


def test_the_time_of_switching_is_told(path: Path) -> None:
    nap: Any = lambda: time.sleep(0.05)  # noqa: E731
    lease, other = DeviceLease(path, load=nap, unload=nap), DeviceLease(path)
    with lease.held():
        pass
    with other.held():
        pass
    stats = lease.stats()
    assert 0.05 <= stats.loading_s < 1
    assert 0.05 <= stats.unloading_s < 1
    assert other.stats().waited_s >= 0.05
