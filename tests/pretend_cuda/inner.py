"""The plugin of the pytest that runs on the pretended device: a problem that it saw fails the test."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


class Problems:
    """What the pretended GPUs of all processes have seen so far."""

    def __init__(self) -> None:
        self._path, self._num_read = Path(os.environ["PRETEND_CUDA_PROBLEMS"]), 0
        self._path.touch()

    def take(self) -> list[str]:
        """Those that nobody has taken yet, once each."""
        with self._path.open() as file:
            file.seek(self._num_read)
            lines = file.read().splitlines()
            self._num_read = file.tell()
        return list(dict.fromkeys(line.partition(": ")[2] for line in lines))


PROBLEMS = Problems()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reports", type=Path, help="file to write the tests' reports to")


@pytest.fixture
def problems() -> Problems:
    """For who expects some. What is left at the end of a test fails it."""
    return PROBLEMS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    from tests.pretend_cuda import install  # torch is there by now, and so is the device

    install.native.forget_problems()
    result = yield
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
