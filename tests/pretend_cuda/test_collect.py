"""What of the suite runs on the pretended device, and what is said where it cannot be built."""

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
