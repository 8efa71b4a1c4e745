"""Tests of forked workers, without Ray: a plain process stands for the raylet, and a Python file for the
worker."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.forked_worker import FORK_SERVER, PRELOAD
from cluster.machines import accelerator
from cluster.processes import find_descendants

PROGRAM = """
import json, os, sys
from ray._raylet import JobID, TaskID

told = {
    "argv": sys.argv[1:],
    "folder": os.getcwd(),
    "variable": os.environ.get("VARIABLE"),
    "pid": os.getpid(),
    "group": os.getpgrp(),
    "parent": os.getppid(),
    "is_preloaded": "colorsys" in sys.modules,
    "task_id": TaskID.for_fake_task(JobID.from_int(1)).hex(),
    "num_threads": len(os.listdir("/proc/self/task")),
}
print(json.dumps(told), flush=True)
sys.stdin.read()
sys.exit(7)
"""
MODULE = "def preload(name): __import__(name)"


class Node:
    """A raylet and the workers started for it, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.errors = folder, folder / "errors"
        self.raylet = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        (folder / "worker.py").write_text(PROGRAM)
        (folder / "what_to_preload.py").write_text(MODULE)
        (folder / "draws_an_id.py").write_text("import colorsys, ray\nray.NodeID.from_random()")

    def start_worker(
        self, *args: str, imports: str = "colorsys", variable: str | None = None
    ) -> "subprocess.Popen[str]":
        variables = {
            "PYTHONPATH": str(self.folder),
            "RAY_RAYLET_PID": str(self.raylet.pid),
            "RAY_JOB_ID": "01000000",
            FORK_SERVER: imports,
            PRELOAD: json.dumps(["what_to_preload:preload", imports]),
        }
        if variable is not None:
            variables["VARIABLE"] = variable
        with self.errors.open("a") as errors:  # also the server's errors, if this worker starts it
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "cluster.forked_worker", "worker.py", *args],
                cwd=self.folder,
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def end(self) -> None:
        self.raylet.communicate(b"\n")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    started = Node(tmp_path_factory.mktemp("node"))
    yield started
    started.end()


def read(worker: "subprocess.Popen[str]") -> dict[str, Any]:
    """Returns what the worker prints about itself; raises if it prints nothing."""
    assert worker.stdout is not None
    told: dict[str, Any] = json.loads(worker.stdout.readline())
    return told


def has_ended(pid: int) -> bool:
    """Whether the process ends within 20 s. An ended process is a zombie until its exit status is read."""
    try:
        return bool(select.select([os.pidfd_open(pid)], [], [], 20.0)[0])
    except ProcessLookupError:
        return True


def test_a_worker_begins_with_what_was_imported_and_is_otherwise_as_asked_for(node: Node) -> None:
    worker = node.start_worker("--option", "7", variable="a value")
    told = read(worker)
    worker.communicate(timeout=20)
    assert told["is_preloaded"]
    assert told["argv"] == ["--option", "7"]
    assert told["folder"] == str(node.folder)
    assert told["variable"] == "a value"
    assert told["num_threads"] == 1


def test_workers_draw_ids_of_their_own(node: Node) -> None:
    """With equal IDs Ray would mistake a task or an object of one worker for another's."""
    workers = [node.start_worker() for _ in range(4)]
    told = [read(worker) for worker in workers]
    for worker in workers:
        worker.communicate(timeout=20)
    assert all(each["is_preloaded"] for each in told)
    assert len({each["task_id"] for each in told}) == 4


def test_what_would_give_ids_twice_is_not_forked(node: Node) -> None:
    worker = node.start_worker(imports="draws_an_id")
    told = read(worker)
    worker.communicate(timeout=20)
    assert not told["is_preloaded"]
    assert "IDs would be given twice" in node.errors.read_text()


def test_workers_have_one_server_and_groups_of_their_own(node: Node) -> None:
    workers = [node.start_worker(variable="here"), node.start_worker()]
    first, second = map(read, workers)
    assert first["parent"] == second["parent"]
    assert (first["group"], second["group"]) == (first["pid"], second["pid"])
    assert second["variable"] is None
    for worker in workers:
        worker.communicate(timeout=20)


def test_who_asked_ends_when_the_worker_does_and_with_its_code(node: Node) -> None:
    worker = node.start_worker()
    read(worker)
    worker.communicate(timeout=20)
    assert worker.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_who_asked_ends_the_worker(node: Node, number: signal.Signals) -> None:
    worker = node.start_worker()
    pid = read(worker)["pid"]
    assert pid != worker.pid
    worker.send_signal(number)
    assert has_ended(pid)
    worker.communicate(timeout=20)
    assert worker.returncode != 0


def test_a_worker_outlives_its_server(node: Node) -> None:
    worker = node.start_worker()
    told = read(worker)
    os.kill(told["parent"], signal.SIGKILL)
    assert has_ended(told["parent"])
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(0.5)
    worker.communicate(timeout=20)
    assert has_ended(told["pid"])


def test_workers_are_found_though_who_started_their_server_has_ended(node: Node) -> None:
    first = node.start_worker(imports="this")  # imports something else, so that the server is this worker's child
    read(first)
    second = node.start_worker(imports="this")
    told = read(second)
    first.communicate(timeout=20)
    assert {told["parent"], told["pid"]} <= find_descendants()
    second.communicate(timeout=20)


def test_a_worker_imports_for_itself_where_the_server_cannot(node: Node) -> None:
    worker = node.start_worker(imports="no_such_module")
    told = read(worker)
    worker.communicate(timeout=20)
    assert told["pid"] == worker.pid
    assert "imports everything itself" in node.errors.read_text()
    assert worker.returncode == 7


def test_a_server_and_its_workers_end_with_their_raylet(tmp_path: Path) -> None:
    node = Node(tmp_path)
    worker = node.start_worker()
    told = read(worker)
    node.end()
    assert has_ended(told["parent"])
    assert has_ended(told["pid"])
    worker.communicate(timeout=20)


def test_a_fork_of_a_process_that_had_asked_for_a_gpu_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not accelerator.is_spoilt_by_fork()
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert accelerator.is_spoilt_by_fork()
