"""Tests of `relay bench growth`, in which an app grows to fill a three-node Ray cluster of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.thorough]

ONE, PEAK, WAKES, DIES, ALL, AGAIN = (
    "one client",
    "32 clients",
    "the other wakes",
    "a node dies",
    "all answered",
    "one client again",
)
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows by event. The benchmark runs in a subprocess: a process can be connected to only one Ray."""
    file = tmp_path_factory.mktemp("growth") / "rows.json"
    run = subprocess.run(
        [str(Path(sys.executable).with_name("relay")), "bench", "growth", "--json", str(file)],
        env=os.environ | {"RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    return {row["event"]: row for row in json.loads(file.read_text())["rows"]}


def test_shard_groups_grow_beyond_one_node_and_nothing_waits_for_a_place(rows: Rows) -> None:
    assert rows[ONE]["groups"] == 1
    assert rows[PEAK]["groups"] >= 3
    assert rows[PEAK]["nodes"] >= 2
    assert rows[PEAK]["waiting"] == 0


def test_the_fast_stages_take_no_room_that_the_slow_one_wants(rows: Rows) -> None:
    assert {(row["encoders"], row["vaes"]) for row in rows.values()} == {(1, 1)}


def test_a_model_that_wakes_at_the_peak_gets_room(rows: Rows) -> None:
    assert rows[WAKES]["answered"] == 1


def test_after_a_node_has_died_no_more_are_wanted_than_the_others_hold(rows: Rows) -> None:
    assert rows[DIES]["waiting"] == 0
    assert rows[DIES]["groups"] >= 1


def test_after_the_peak_one_of_each_is_left(rows: Rows) -> None:
    assert rows[AGAIN]["groups"] == 1


@pytest.mark.parametrize("event", [ONE, PEAK, WAKES, DIES, ALL, AGAIN])
def test_no_request_is_cut_and_the_pictures_are_the_plain_pipelines(rows: Rows, event: str) -> None:
    row = rows[event]
    assert row["answered"] == row["requests"] > 0
    assert row["grey_levels"] <= 1
