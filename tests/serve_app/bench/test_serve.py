"""Tests of `relay bench serve` against the served app."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.bench.load.endpoint import Outcome, Server
from serve_app.bench.load.loads import Load
from serve_app.bench.load.loop import drive
from serve_app.bench.load.workload import Ask
from serve_app.bench.serve import Outputs, run
from tests.serve_app.pictures import file, noise

pytestmark = pytest.mark.slow


def test_the_stages_of_ours_and_the_rest_add_up_to_the_latency(flux_app: Any, tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    asks = [Ask(prompt=f"a fox {i}", size="64x64", steps=2, n=2) for i in range(4)]
    run(
        Server(flux_app.url, None),
        [Load("2 at once", asks, 2)],
        Outputs(rows_file, with_requests=True),
        slo_scale=1000.0,
        slo_ms=None,
        num_solo=1,
        num_processes=1,
        workload={},
    )
    document = json.loads(rows_file.read_text())
    [row], [kind] = document["rows"], document["kinds"]
    assert (row["answered"], row["refused"], row["failed"], row["slo_met"]) == (4, 0, 0, 1.0)
    assert row["pictures_per_s"] == pytest.approx(2 * row["requests_per_s"])
    assert kind["slo_s"] == pytest.approx(1000 * kind["solo_s"])
    stages = document["stages_ms"]["2 at once"]
    assert {"encode", "queue", "denoise", "decode", "rest"} <= stages.keys()
    took_ms = [(each["done_s"] - each["sent_s"]) * 1e3 for each in document["requests"]["2 at once"]]
    assert sum(stages.values()) == pytest.approx(sum(took_ms) / 4)
    assert stages["rest"] > 0


def answered(server: Server, ask: Ask) -> bool:
    outcomes: list[Outcome] = []
    asyncio.run(drive(server, [ask], 1, outcomes.append))
    assert [each.error for each in outcomes] == [""]
    return outcomes[0].is_answered


def test_edits_are_asked_by_a_form(flux_app: Any, tmp_path: Path) -> None:
    image = tmp_path / "noise.png"
    image.write_bytes(file(noise()))
    server = Server(flux_app.url, f"tiny-{flux_app.family.name}", endpoint="edits", image=image)
    assert answered(server, Ask(prompt="a fox", steps=2, n=2))


def test_videos_are_jobs_that_are_fetched(wan_app: Any) -> None:
    server = Server(wan_app.url, None, endpoint="videos", extra_body={"num_frames": 5})
    assert answered(server, Ask(prompt="waves", steps=1))
