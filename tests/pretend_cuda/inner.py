"""The plugin of the pytest that runs on the pretended device: a problem that it saw fails the test."""

import json
import os
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
    """For who expects some. What is left at the end of a test fails it."""
    return PROBLEMS


@pytest.fixture
def lose_gpu() -> Callable[[str], AbstractContextManager[None]]:
    """`with lose_gpu("ServeReplica:app:Vae"):` who has this in its command line loses its GPU, for good."""

    @contextmanager
    def lose(whose: str) -> Iterator[None]:
        lost = Path(os.environ["PRETEND_CUDA_LOST"])
        unseen = lost.with_suffix(".unseen")
        unseen.write_text(whose)
        unseen.replace(lost)  # nobody reads half of it
        yield
        lost.unlink()

    return lose


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    install.native.forget_problems()
    result = yield
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)  # what ends with the test has no work under way then
        torch.cuda.set_per_process_memory_fraction(1.0, index)  # a stage's share is its process's
    if seen := PROBLEMS.take():
        pytest.fail("the pretended GPU saw:\n" + "\n".join(seen), pytrace=False)
    return result


class Reporter:
    """Writes a line for every report."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config, self._path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._path.open("a") as file:
            file.write(json.dumps(data, default=str) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.reports is not None:
        config.pluginmanager.register(Reporter(config, config.option.reports))
