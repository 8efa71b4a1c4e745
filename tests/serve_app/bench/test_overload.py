"""Tests of `relay bench overload`: its summary of answers and, with --thorough, a run."""

import json
from pathlib import Path

import pytest

from serve_app.bench.overload import Answer, run, summarize
from tests.relay_server import ROOT, free_port


def test_what_is_late_or_refused_is_no_goodput() -> None:
    answers = [
        Answer(0.0, 0.5, 200),  # before the measured time
        Answer(1.0, 2.0, 200),
        Answer(2.0, 2.1, 429, 3),
        Answer(3.0, 3.3, 429, 5),
        Answer(3.5, 4.5, 200),
        Answer(4.0, 9.5, 200),
        Answer(5.0, 10.0, 504),
        Answer(6.0, 6.1, 500),
    ]
    row = summarize(answers, 1.0, 11.0, deadline_s=5.0, peak=0.4)
    assert (row["done_per_s"], row["over_peak"], row["refused"], row["late"], row["errors"]) == (0.2, 0.5, 2, 2, 1)
    assert row["told_p50_s"] == 4
    assert row["room_p50_s"] == pytest.approx((1.5 + 0.5) / 2)
    assert row["refused_p50_ms"] == pytest.approx(200)
    assert row["p99_over_deadline"] > 1


@pytest.mark.slow
@pytest.mark.thorough
def test_it_measures_an_overload(tmp_path: Path) -> None:
    """The benchmark starts a Ray of its own."""
    file = tmp_path / "rows.json"
    config = ROOT / "configs" / "quickstart.yaml"
    run(config, port=free_port(), num_steps=2, duration_s=8.0, json_file=file)
    rows = {row["measure"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["over_peak"]["closed"] == pytest.approx(1)
    assert rows["refused"]["closed"] == rows["errors"]["closed"] == rows["errors"]["open"] == 0
    assert rows["asked_per_s"]["open"] > rows["asked_per_s"]["closed"]
    assert rows["refused"]["open"] > 0
