"""Tests of `relay bench compare` with a few tiny images."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.progress import Progress

from serve_app.bench.compare import Cell, compare, compete
from serve_app.bench.contenders import OURS, PLAIN, Contender, Draw, Site, build_contenders
from serve_app.bench.models import bench_model
from tests.relay_server import ENV, RELAY, free_port
from tests.serve_app.pictures import file, noise


@pytest.mark.slow
@pytest.mark.thorough
def test_everybody_draws_the_same_and_who_needs_a_gpu_is_left_out(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    options = ["--sizes", "64x64", "--max-concurrency", "2", "--steps", "2", "--num-prompts", "4", "--rounds", "1"]
    options += ["--ways", "whole x N,batched x N", "--port", str(free_port()), "--json", str(rows_file)]
    done = subprocess.run(
        [RELAY, "bench", "compare", *options], env=ENV, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "left out: device_map: needs 2 GPUs" in done.stderr
    document = json.loads(rows_file.read_text())
    rows = {row["way"]: row for row in document["rows"]}
    assert set(rows) == {PLAIN, "whole x N", "batched x N", OURS}
    assert rows[PLAIN]["grey_levels"] == rows["whole x N"]["grey_levels"] == 0
    assert max(row["grey_levels"] for row in rows.values()) <= 1  # requests that share a batch may differ by one
    assert rows[OURS]["rate_ratio"] == rows[OURS]["p95_ratio"] == 1
    assert rows[PLAIN]["rate_ratio"] == pytest.approx(rows[OURS]["pictures_per_s"] / rows[PLAIN]["pictures_per_s"])


def test_who_needs_gpus_is_told_why_he_is_left_out(tmp_path: Path) -> None:
    model = bench_model("tiny", tmp_path)
    told, only_cpus = {}, "is for machines without a GPU"
    for num_gpus in (0, 1, 2):
        site = Site(model, num_cores=2, num_gpus=num_gpus, url="")
        told[num_gpus] = [fault for each in build_contenders(site).values() if (fault := each.find_fault(site))]
    assert told == {
        0: ["needs 1 GPU, but there are 0", "needs 2 GPUs, but there are 0"],
        1: [only_cpus, "needs 2 GPUs, but there are 1", only_cpus],
        2: [only_cpus, only_cpus],
    }


def test_ways_take_turns_there_and_back_and_are_asked_the_same(tmp_path: Path) -> None:
    """Each way is started and warmed up again for each of its turns."""
    log: list[tuple[str, str]] = []

    def contender(name: str) -> Contender:
        @contextmanager
        def start(_site: Site) -> Iterator[Draw]:
            log.append((name, "starts"))
            yield lambda body: (log.append((name, body["prompt"])), file(noise()))[1]
            log.append((name, "ends"))

        return Contender(start)

    site = Site(bench_model("tiny", tmp_path), num_cores=2, num_gpus=0, url="")
    cell = Cell("64x64", 1, 2)
    ways = {name: contender(name) for name in (PLAIN, OURS)}
    with Progress(disable=True) as progress:
        records = compete(site, ways, [cell], None, 1, progress)
    warm_up, *_ = [body["prompt"] for body in cell.bodies(-1, None)]
    first, second = [[body["prompt"] for body in cell.bodies(turn, None)] for turn in (0, 1)]
    assert len({warm_up, *first, *second}) == 5
    turns = [(PLAIN, first), (OURS, first), (OURS, second), (PLAIN, second)]
    expected = [(way, what) for way, asked in turns for what in ("starts", warm_up, *asked, "ends")]
    assert log == expected
    rows = {row["way"]: row for row in compare(records[cell])}
    assert rows[OURS]["rate_ratio"] == rows[OURS]["p95_ratio"] == 1
    assert rows[PLAIN]["grey_levels"] == 0
    assert rows[PLAIN]["rate_ratio"] == rows[OURS]["pictures_per_s"] / rows[PLAIN]["pictures_per_s"]
