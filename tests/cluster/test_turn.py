"""Who has the turn is alone on the device, and nobody waits for long, nor for the dead."""

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

from cluster.turn import PERIOD_S, Turn

PATIENCE_S = 20.0
WORKER = """
import sys, time
from pathlib import Path
from cluster.turn import Turn

folder, name, num_works, work_s, turn_s, is_busy = sys.argv[1:]
log = (Path(folder) / f"{name}.log").open("a", buffering=1)
tell = lambda word: print(word, time.monotonic(), file=log)
turn = Turn(
    Path(folder) / "device", arrive=lambda: tell("arrive"), leave=lambda: tell("leave"), turn_s=float(turn_s)
)
for _ in range(int(num_works)):
    with turn.work():
        tell("work")
        time.sleep(float(work_s))
    if is_busy == "no":
        turn.rest()
        time.sleep(0.03)
turn.rest()
tell("done")
time.sleep(60)
"""


class Workers:
    """Processes that take turns at one device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *, works: int, work_s: float, turn_s: float = 60.0, is_busy: bool = False) -> None:
        words = [self.folder, name, works, work_s, turn_s, "yes" if is_busy else "no"]
        command = [sys.executable, "-c", WORKER, *map(str, words)]
        self.processes[name] = subprocess.Popen(command, cwd=Path(__file__).parents[2])

    def told(self, name: str, word: str) -> list[float]:
        """When it told this."""
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
        arrivals, departures = workers.told(name, "arrive"), workers.told(name, "leave")
        stays += list(zip(arrivals, [*departures, float("inf")], strict=False))
    assert len(stays) >= 3
    for (_, left), (arrived, _) in pairwise(sorted(stays)):
        assert left <= arrived


def test_who_is_killed_in_his_turn_keeps_nobody_waiting(workers: Workers) -> None:
    workers.start("victim", works=1, work_s=60)
    workers.wait_for("victim", "work")
    workers.start("next", works=1, work_s=0)
    time.sleep(0.3)  # it is waiting, or not even up
    assert not workers.told("next", "work")
    workers.kill("victim")
    workers.wait_for("next", "done")


def test_who_has_work_without_end_gives_way_after_its_time_and_comes_back(workers: Workers) -> None:
    workers.start("busy", works=10**6, work_s=0.005, turn_s=0.1, is_busy=True)
    workers.wait_for("busy", "work")
    workers.start("other", works=3, work_s=0.005)
    workers.wait_for("other", "done")
    [*_, last] = workers.told("busy", "leave")
    workers.wait_for("busy", "arrive", len(workers.told("busy", "leave")) + 1)
    assert workers.told("busy", "arrive")[-1] > last


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device"


def test_while_nobody_asks_the_turn_stays_and_costs_next_to_nothing(path: Path) -> None:
    turn = Turn(path, turn_s=0.0)
    began = time.monotonic()
    for _ in range(1000):
        with turn.work():
            pass
        turn.rest()
    assert time.monotonic() - began < 0.5
    time.sleep(3 * PERIOD_S)
    assert (turn.stats().num_turns, turn.stats().is_here) == (1, True)


def test_who_rests_gives_way_to_who_asks(path: Path) -> None:
    """Two openings of one file exclude each other as two processes do."""
    one, other = Turn(path, turn_s=60), Turn(path, turn_s=60)
    with one.work():
        pass
    one.rest()
    with other.work():
        assert not one.stats().is_here
    assert other.stats().waited_s < 1


def test_works_that_follow_at_once_are_one_turn(path: Path) -> None:
    """Of a queue of requests each rests and none gives way, for the next has begun by then."""
    turn, other = Turn(path, turn_s=60), Turn(path)
    done = threading.Event()

    def wait() -> None:
        with other.work():
            done.set()

    with turn.work():
        threading.Thread(target=wait, daemon=True).start()
        time.sleep(5 * PERIOD_S)
    for _ in range(5):
        turn.rest()
        with turn.work():
            time.sleep(2 * PERIOD_S)
    assert turn.stats().num_turns == 1
    assert not done.is_set()
    turn.rest()
    assert done.wait(PATIENCE_S)


def test_what_fails_to_arrive_leaves_the_turn_to_others(path: Path) -> None:
    events: list[str] = []

    def fail() -> None:
        raise MemoryError("no room")

    turn = Turn(path, arrive=fail, leave=lambda: events.append("left"))
    with pytest.raises(MemoryError), turn.work():
        events.append("worked")
    assert events == ["left"]
    with Turn(path).work():
        pass


def test_the_time_of_switching_is_told(path: Path) -> None:
    nap: Any = lambda: time.sleep(0.05)  # noqa: E731
    turn, other = Turn(path, arrive=nap, leave=nap), Turn(path)
    with turn.work():
        pass
    with other.work():
        pass
    stats = turn.stats()
    assert 0.05 <= stats.arriving_s < 1
    assert 0.05 <= stats.leaving_s < 1
    assert other.stats().waited_s >= 0.05
