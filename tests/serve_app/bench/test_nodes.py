"""Tests of `relay bench nodes`, in which load and nodes come and go, on a Ray cluster of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.thorough]

BEGINS, JOINS, FALLS = "one client", "node joins under load", "load falls"
WAKES, DIES = "sleeping stage wakes", "node dies"
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows by event. The benchmark runs in a subprocess: a process can be connected to only one Ray."""
    file = tmp_path_factory.mktemp("nodes") / "rows.json"
    run = subprocess.run(
        [str(Path(sys.executable).with_name("relay")), "bench", "nodes", "--json", str(file)],
        env=os.environ | {"RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    return {row["event"]: row for row in json.loads(file.read_text())["rows"]}


def test_a_shard_group_is_spread_where_no_node_has_room_for_it(rows: Rows) -> None:
    """The benchmark itself checks that the replica warns."""
    assert rows[BEGINS]["groups"] == "2"


def test_load_adds_a_whole_shard_group_on_one_node_that_joins(rows: Rows) -> None:
    assert rows[JOINS]["groups"] == "1 + 2"


def test_a_shard_group_that_is_no_longer_wanted_ends_its_requests_first(rows: Rows) -> None:
    row = rows[FALLS]
    assert row["groups"] in ("1", "2")
    assert row["answered"] == row["requests"] == 2


def test_only_the_stage_that_is_busy_scales(rows: Rows) -> None:
    assert {row["encoders"] for row in rows.values()} == {1}


def test_a_node_that_dies_takes_no_accepted_request_with_it(rows: Rows) -> None:
    row = rows[DIES]
    assert row["answered"] == row["requests"] == 12


@pytest.mark.parametrize("event", [BEGINS, JOINS, WAKES, DIES])
def test_the_pictures_are_the_plain_pipelines(rows: Rows, event: str) -> None:
    row = rows[event]
    assert row["answered"] == row["requests"]
    assert row["grey_levels"] <= 1
