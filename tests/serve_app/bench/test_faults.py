"""Tests of `relay bench faults`, which kills, terminates and stops every process of a served model.

Runs in a Ray of its own; all cells of the table take half an hour on an idle machine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.thorough]

Row = dict[str, Any]
HANGS_S = 100.0
"""Seconds; far longer than a replica takes to start, even on a busy machine."""
STAGES = ("rank 0", "rank 1", "encoder", "VAE")
ENTRANCES = ("ingress", "HTTP proxy")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows of the benchmark, which runs in a subprocess: a process can be connected to only one Ray."""
    file = tmp_path_factory.mktemp("faults") / "rows.json"
    command = [str(Path(sys.executable).with_name("relay")), "bench", "faults", "--json", str(file)]
    run = subprocess.run(
        command,
        env=os.environ | {"RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=5400,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    found: list[Row] = json.loads(file.read_text())["rows"]
    return found


def of(rows: list[Row], *processes: str, **columns: Any) -> list[Row]:
    """Returns the rows of these processes that have these column values. Fails if there are none."""
    found = [
        row
        for row in rows
        if row["process"] in processes and all(row[name] == value for name, value in columns.items())
    ]
    assert found
    return found


def test_all_requests_are_answered_whatever_happens_to_a_process_that_works_for_them(rows: list[Row]) -> None:
    for row in of(rows, *STAGES, "Serve controller", signals=1, when="loaded"):
        assert row["answered"] == row["requests"] == 8, row


def test_an_ingress_that_is_terminated_loses_no_request(rows: list[Row]) -> None:
    for row in of(rows, *ENTRANCES, signal="SIGTERM"):
        assert row["answered"] == row["requests"], row


def test_a_new_request_never_hangs(rows: list[Row]) -> None:
    for row in of(rows, *STAGES, *ENTRANCES, signals=1):
        assert row["new_request_wait_s"] < HANGS_S, row


def test_a_replica_that_is_told_to_go_is_not_missed(rows: list[Row]) -> None:
    """A replica that gets SIGTERM completes its requests, so nothing is computed again."""
    for row in of(rows, "rank 0", "encoder", "VAE", signal="SIGTERM"):
        assert row["encoded_again"] == row["steps_again"] == 0, row


def test_every_picture_equals_the_plain_pipelines(rows: list[Row]) -> None:
    assert max(row["grey_levels"] for row in rows) <= 1


def test_nothing_is_encoded_again(rows: list[Row]) -> None:
    for row in of(rows, *STAGES, when="loaded"):
        assert row["encoded_again"] == 0, row


def test_no_step_is_done_again_unless_a_rank_died(rows: list[Row]) -> None:
    for row in of(rows, "encoder", "VAE", when="loaded"):
        assert row["steps_again"] == 0, row


def test_what_has_to_end_ends_and_is_reaped(rows: list[Row]) -> None:
    assert [row for row in rows if row["left_over"] or row["zombies"]] == []


def test_a_request_that_kills_its_stage_is_given_up_and_takes_nobody_with_it(rows: list[Row]) -> None:
    [row] = of(rows, "rank 0", when="one request runs")
    assert row["answered"] == row["requests"] == 7
    assert row["signals"] <= 4


def test_a_client_that_leaves_frees_its_seat_and_disturbs_nobody(rows: list[Row]) -> None:
    [row] = of(rows, "client")
    assert row["answered"] == row["requests"] == 4
    assert row["new_request_wait_s"] < 2
