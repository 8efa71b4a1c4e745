"""Tests that `relay bench gate` fails on a regression."""

from pathlib import Path

import pytest

from deployments.engine.merge import Merger
from serve_app.bench.gate import LIMITS, measure_merging
from serve_app.bench.gate_rule import find_fault
from serve_app.bench.models import bench_model

pytestmark = [pytest.mark.slow, pytest.mark.thorough]
MERGING = LIMITS["merging_speedup_at_8"]


def test_it_fails_once_forwards_no_longer_merge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The figure is of processor time, not wall time: eight forwards take far more than one merged forward, on a
    busy machine too."""
    model = bench_model("tiny", tmp_path)
    assert find_fault(measure_merging(model)["merging_speedup_at_8"], MERGING, []) is None
    monkeypatch.setattr(Merger, "signature", lambda _self, _inputs: object())
    assert find_fault(measure_merging(model)["merging_speedup_at_8"], MERGING, []) is not None
