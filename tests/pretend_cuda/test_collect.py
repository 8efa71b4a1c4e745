"""The tests that run on the simulated device, and the messages where it cannot be built."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretend_cuda import build as building
from tests.pretend_cuda.items import ROOT
from tests.pretend_cuda.sweep import ALWAYS, GPU_THOROUGH, THOROUGH


@pytest.mark.parametrize("entry", [*ALWAYS, *THOROUGH, *GPU_THOROUGH])
def test_what_the_sweep_names_is_there(entry: str) -> None:
    file, _, test = entry.partition("[")[0].partition("::")
    assert f"def {test}" in (ROOT / "tests" / file).read_text()


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "COMPILER", "no-such-compiler")
    with pytest.raises(building.NoCompiler, match="is built with no-such-compiler, and there is none: install it"):
        building.build()


@pytest.mark.thorough
def test_after_a_test_on_the_pretended_gpu_nothing_is_left_of_the_one_before() -> None:
    share = "tests/deployments/memory/test_share.py"
    chosen = [
        f"{share}::test_who_has_a_whole_gpu_has_all_of_it_without_a_cap",
        f"{share}::test_who_takes_more_than_its_share_fails_alone",
        f"{Path(__file__).relative_to(ROOT)}::test_without_a_compiler_the_reason_is_told",
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *chosen]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout
