"""kill -9 of every process of a served model, as `relay bench recovery` does it, on a Ray of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RANKS = ("rank 0", "rank 1")
VICTIMS = (*RANKS, "encoder", "vae")
Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Rows:
    """By what was killed, and when. In a process of its own: one can be connected to one Ray only."""
    idle_victims = VICTIMS if request.config.getoption("--thorough") else ("rank 1",)
    file = tmp_path_factory.mktemp("recovery") / "rows.json"
    command = [str(Path(sys.executable).with_name("relay")), "bench", "recovery", "--json", str(file)]
    command += ["--idle", ",".join(idle_victims)]
    run = subprocess.run(
        command,
        env=os.environ | {"RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    return {(row["killed"], row["when"]): row for row in json.loads(file.read_text())["rows"]}


@pytest.mark.parametrize("victim", VICTIMS)
def test_all_requests_are_answered_when_a_process_is_killed_under_them(rows: Rows, victim: str) -> None:
    row = rows[victim, "busy"]
    assert row["answered"] == row["requests"] == 7


@pytest.mark.parametrize("victim", VICTIMS)
def test_the_next_request_is_answered_when_a_process_is_killed_while_idle(rows: Rows, victim: str) -> None:
    if (victim, "idle") not in rows:
        pytest.skip("takes half a minute each: --thorough")
    row = rows[victim, "idle"]
    assert row["answered"] == row["requests"] == 1


def test_repeated_pictures_equal_the_plain_pipelines(rows: Rows) -> None:
    assert max(row["grey_levels"] for row in rows.values()) <= 1


@pytest.mark.parametrize("victim", VICTIMS)
def test_nothing_is_encoded_again(rows: Rows, victim: str) -> None:
    assert rows[victim, "busy"]["encoded_again"] == 0


@pytest.mark.parametrize("victim", ["encoder", "vae"])
def test_no_step_is_done_again_unless_a_rank_died(rows: Rows, victim: str) -> None:
    assert rows[victim, "busy"]["steps_again"] == 0


@pytest.mark.parametrize("victim", RANKS)
def test_a_dead_rank_takes_its_whole_group_with_it(rows: Rows, victim: str) -> None:
    assert [row["left_over"] for (killed, _), row in rows.items() if killed == victim] in ([0], [0, 0])


def test_a_client_that_leaves_frees_its_seat_and_disturbs_nobody(rows: Rows) -> None:
    row = rows["client", "busy"]
    assert row["answered"] == row["requests"] == 3
    assert row["grey_levels"] <= 1
    assert row["left_over"] == 0
    assert row["recovery_s"] < 2
