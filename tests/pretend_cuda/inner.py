"""The plugin of the pytest that runs on the simulated device: a problem that the device reports fails the test."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from tests.pretend_cuda import install
from tests.pretend_cuda.problems import Problems

PROBLEMS = Problems(Path(os.environ["PRETEND_CUDA_PROBLEMS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reports", type=Path, help="file to write the tests' reports to")


@pytest.fixture
def problems() -> Problems:
    """The problems, for tests that expect some and take them. Problems left at the end of a test fail it."""
    return PROBLEMS


@pytest.fixture
def lose_gpu() -> Callable[[str], AbstractContextManager[None]]:
    """Yields a context: `with lose_gpu("ServeReplica:app:Vae"):` loses the GPU, for good, of each process that has
    this text in its command line."""

    @contextmanager
    def lose(whose: str) -> Iterator[None]:
        lost = Path(os.environ["PRETEND_CUDA_LOST"])
        unseen = lost.with_suffix(".unseen")
        unseen.write_text(whose)
        unseen.replace(lost)  # atomic, so that no process reads half of it
        yield
        lost.unlink()

    return lose


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    install.native.forget_problems()
    result = yield
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)  # no work is under way when the test's objects end
        torch.cuda.set_per_process_memory_fraction(1.0, index)  # resets the share that a stage of the test set
    if seen := PROBLEMS.take():
        pytest.fail("the pretended GPU saw:\n" + "\n".join(seen), pytrace=False)
    return result


class Reporter:
    """Writes a line for every report to a file."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config, self._path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._path.open("a") as file:
            file.write(json.dumps(data, default=str) + "\n")


def _end_with_reader() -> None:
    """Ends this process when the process that reads its reports ends: if killed, that one cannot stop this one."""
    while str(os.getppid()) == os.environ["PRETEND_CUDA_READER"]:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGINT)


def pytest_configure(config: pytest.Config) -> None:
    threading.Thread(target=_end_with_reader, daemon=True).start()
    if config.option.reports is not None:
        config.pluginmanager.register(Reporter(config, config.option.reports))
