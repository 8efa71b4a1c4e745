"""Test of `relay bench tiers` with a few images."""

import json
from pathlib import Path

import pytest

from serve_app.bench.tiers import QUICK, run

pytestmark = [pytest.mark.slow, pytest.mark.thorough]


def test_each_tier_is_measured_against_high(tmp_path: Path) -> None:
    """The benchmark starts a Ray of its own."""
    rows_file, picture = tmp_path / "rows.json", tmp_path / "tiers.svg"
    run(
        model="embedded://shapes",
        tiers=QUICK,
        num_prompts=3,
        num_steps=14,
        json_file=rows_file,
        svg_file=picture,
    )
    rows = {row["tier"]: row for row in json.loads(rows_file.read_text())["rows"]}
    assert list(rows) == ["high", "medium", "low"]
    forwards = [row["forwards"] for row in rows.values()]
    assert forwards == sorted(set(forwards), reverse=True)
    assert rows["high"]["speedup_1"] == rows["high"]["speedup_8"] == 1
    assert rows["high"]["psnr_db"] > rows["medium"]["psnr_db"] > rows["low"]["psnr_db"] > 30
    assert {row["background"] for row in rows.values()} == {1.0}
    assert "medium" in picture.read_text()
