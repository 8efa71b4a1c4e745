"""Tests of `relay bench memory`, which runs each way in its own process, and of its plot of the Pareto front."""

import csv
import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from serve_app.bench import memory
from serve_app.bench.frontier import draw_frontier, find_frontier
from serve_app.bench.memory_case import HAS_GPU


@pytest.mark.slow
@pytest.mark.thorough
def test_every_way_gets_a_row_and_what_cannot_run_says_why(tmp_path: Path) -> None:
    ways = (memory.PLAIN, "nf4")
    memory.run(
        model="tiny",
        ways=ways,
        num_pictures=1,
        num_steps=1,
        json_file=tmp_path / "m.json",
        csv_file=tmp_path / "m.csv",
        svg_file=tmp_path / "m.svg",
    )
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["way"] for row in rows] == list(ways)
    assert rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1
    assert all(row["load_s"] > 0 and row["p50_s"] > 0 and row["peak_mib"] > 0 for row in rows[:1])
    if not HAS_GPU:
        assert "quantization" in rows[1]["error"]
    with (tmp_path / "m.csv").open() as file:
        assert [row["way"] for row in csv.DictReader(file)] == list(ways)
    texts = [text.text for text in ElementTree.parse(tmp_path / "m.svg").findall(".//{*}text")]
    assert memory.PLAIN in texts


def test_the_frontier_holds_what_nothing_beats() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 2.5), (3.0, 2.0), (1.0, 4.0)]
    frontier = find_frontier(points)
    assert frontier == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(frontier))


def test_names_are_escaped() -> None:
    svg = draw_frontier({"a < b": (1.0, 1.0)}, x_label="x", y_label="y")
    assert "a &lt; b" in svg
    ElementTree.fromstring(svg)
