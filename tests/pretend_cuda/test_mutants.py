"""Faults of kinds that GPUs silently accept are found: a test that cannot fail would show nothing.

The tests take minutes: `pytest tests/pretend_cuda --thorough -k mutant`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretend_cuda.build import NoCompiler, build
from tests.pretend_cuda.items import ROOT, environment
from tests.pretend_cuda.mutants import MUTANTS, Mutant

COPIED = ("cluster", "deployments", "serve_app", "tests", "configs", "pyproject.toml")
TESTS_FAILED = 1
"""pytest's exit code for failed tests; others mean that it could not run them."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutants_line_is_there_once(mutant: Mutant, tmp_path: Path) -> None:
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    shutil.copy(ROOT / mutant.file, tmp_path / mutant.file)
    mutant.apply(tmp_path)


def test_a_mutant_is_killed(mutant: Mutant, copy: Path) -> None:
    mutant.apply(copy)
    code, output = run_on_device(copy, mutant.killed_by)
    assert code == TESTS_FAILED, output


def test_the_tests_that_kill_pass_without_a_mutant(killers: list[str], copy: Path) -> None:
    code, output = run_on_device(copy, *killers)
    assert code == 0, output


def run_on_device(root: Path, *tests: str) -> tuple[int, str]:
    try:
        library = build()
    except NoCompiler as reason:
        pytest.skip(str(reason))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.pretend_cuda.inner"]
    ran = subprocess.run(
        [*command, *tests],
        cwd=root,
        env=environment(library, root / "problems", root=root),
        capture_output=True,
        text=True,
        timeout=600,
    )
    return ran.returncode, ran.stdout[-3000:] + ran.stderr[-3000:]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_asked = metafunc.config.getoption("--thorough")
    if metafunc.function is test_a_mutant_is_killed:
        metafunc.parametrize("mutant", MUTANTS if is_asked else [], ids=lambda mutant: mutant.name)
    if "killers" in metafunc.fixturenames:
        killers = sorted({mutant.killed_by for mutant in MUTANTS})
        metafunc.parametrize("killers", [killers] if is_asked else [], ids=["all"] if is_asked else [])
