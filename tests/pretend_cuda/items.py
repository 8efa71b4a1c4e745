"""Runs tests that need a GPU on the simulated one, and reports them under their own names.

The device must exist before torch is imported, so another process runs them: one pytest for all tests of a group.
Its reports are taken over as they arrive.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import pytest

from tests.pretend_cuda.build import NoCompiler, build

ROOT = Path(__file__).parents[2]
NUM_GPUS, GIB = 2, 16
PERIOD_S = 0.05
ENDS_IN_S = 30.0
MUST_END_IN_S = 1800.0
TAIL = 3000


def environment(library: Path, problems: Path, *, root: Path = ROOT) -> dict[str, str]:
    """Returns the environment of a process with simulated GPUs; processes that it starts have them too."""
    folder = root / "tests" / "pretend_cuda"
    here = {
        "PRETEND_CUDA": str(library),
        "PRETEND_CUDA_GPUS": str(NUM_GPUS),
        "PRETEND_CUDA_GIB": str(GIB),
        "PRETEND_CUDA_PROBLEMS": str(problems),
        "PRETEND_CUDA_READER": str(os.getpid()),
        "PRETEND_CUDA_LOST": str(problems.with_name("lost")),
        "OMP_NUM_THREADS": "1",  # in every thread, so that sums are equal bit for bit
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),  # nvidia-smi
        "PYTHONPATH": os.pathsep.join([str(folder / "preload"), str(root)]),
    }
    return os.environ | here


@dataclass(eq=False)
class Group:
    """A group of tests that one process runs."""

    name: str
    options: tuple[str, ...]
    """Options of its pytest."""
    _process: "subprocess.Popen[bytes] | None" = None
    _num_read: int = 0
    _reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def reports(self, node_id: str) -> list[dict[str, Any]]:
        """Waits for the reports of one test: setup, call and teardown; empty if the process ended without them."""
        assert self._process is not None
        deadline = time.monotonic() + MUST_END_IN_S
        while time.monotonic() < deadline:
            has_ended = self._process.poll() is not None
            self._read()
            found = self._reports.get(node_id, [])
            if has_ended or any(report["when"] == "teardown" for report in found):
                return found
            time.sleep(PERIOD_S)
        return []

    def last_words(self) -> str:
        return self._output.read_text(errors="replace")[-TAIL:]

    def close(self) -> None:
        """Ends the process: it shuts its Ray down after its last test, or this session ends early."""
        if self._process is None:
            return
        for end in (lambda: None, partial(self._process.send_signal, signal.SIGINT), self._process.kill):
            end()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_IN_S)
                break
        self._folder.cleanup()

    @property
    def has_started(self) -> bool:
        return self._process is not None

    def start(self, node_ids: list[str]) -> None:
        """Starts a process that runs all of these tests. Raises NoCompiler."""
        library = build()
        self._folder = tempfile.TemporaryDirectory(prefix="latent-relay-pretend-")
        folder = Path(self._folder.name)
        self._output, self._file = folder / "output", folder / "reports"
        self._file.touch()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.pretend_cuda.inner"]
        options = [*self.options, "--reports", str(self._file), f"@{folder / 'tests'}"]
        (folder / "tests").write_text("\n".join(node_ids))
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, *options],
                cwd=ROOT,
                env=environment(library, folder / "problems"),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _read(self) -> None:
        with self._file.open() as file:
            file.seek(self._num_read)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break  # it is being written
                self._num_read = file.tell()
                report = json.loads(line)
                self._reports.setdefault(report["nodeid"], []).append(report)


class Pretended(pytest.Item):
    """A test of a group, which another process runs."""

    def __init__(self, *, origin: pytest.Item, group: Group, **of_item: Any) -> None:
        super().__init__(**of_item)
        self._origin, self._group = origin, group
        self.node_id = origin.nodeid  # the id in the process that runs it; xdist adds a group to the id here
        self.own_markers = [mark for mark in origin.own_markers if mark.name not in {"skipif", "xdist_group"}]
        self.add_marker(pytest.mark.xdist_group(group.name))

    def reportinfo(self) -> Any:
        return self._origin.reportinfo()

    def runtest(self) -> None:
        raise AssertionError("another process runs it")

    def tell(self) -> None:
        """Reports the test in this session, with the other process's reports."""
        self.ihook.pytest_runtest_logstart(nodeid=self.nodeid, location=self.location)
        for report in self._told():
            report.nodeid = self.nodeid
            self.ihook.pytest_runtest_logreport(report=report)
        self.ihook.pytest_runtest_logfinish(nodeid=self.nodeid, location=self.location)

    def _told(self) -> Iterable[pytest.TestReport]:
        try:
            if not self._group.has_started:
                self._group.start([item.node_id for item in self.session.items if self._is_with(item)])
        except NoCompiler as reason:
            return [self._report("skipped", (str(self.path), 0, f"Skipped: {reason}"))]
        told = self._group.reports(self.node_id)
        if not told:
            return [self._report("failed", f"the process ended without a word on it:\n{self._group.last_words()}")]
        return [self._restored(data) for data in told]

    def _is_with(self, item: pytest.Item) -> TypeGuard["Pretended"]:
        return isinstance(item, Pretended) and item._group is self._group

    def _restored(self, data: dict[str, Any]) -> pytest.TestReport:
        report: Any = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)  # the reason of a skip; JSON has no tuples
        return report  # type: ignore[no-any-return]

    def _report(self, outcome: Any, longrepr: Any) -> pytest.TestReport:
        return pytest.TestReport(self.nodeid, self.location, {}, outcome, longrepr, when="call")
