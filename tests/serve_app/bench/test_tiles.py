"""Test of `relay bench tiles` with one small image."""

import json
from pathlib import Path

import pytest

from serve_app.bench.tiles import run

pytestmark = [pytest.mark.slow, pytest.mark.thorough]


def test_two_replicas_are_measured_against_one_and_draw_the_same(tmp_path: Path) -> None:
    """The benchmark starts a Ray of its own."""
    file = tmp_path / "rows.json"
    run(model="tiny", size=256, tile=64, num_rounds=1, json_file=file)
    one, two = json.loads(file.read_text())["rows"]
    assert (one["replicas"], two["replicas"]) == (1, 2)
    assert one["speedup"] == 1
    assert two["speedup"] == pytest.approx(one["decode_s"] / two["decode_s"])
    assert one["grey_levels"] == two["grey_levels"] == 0
