"""Measures the time from deploying to ready, and each process's part in it: the three stages, one whole pipeline.

Each runs on its own newly started, idle Ray; the stages run once more on theirs, where their fork server
(cluster/fork_server.py) has done its imports already. The checkpoint was just written and is in the page cache, so
no process waits for a disk. On a machine that also does other work, compare the seconds of processor time.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from ray import serve
from ray.serve import Application

from serve_app.app import build_app
from serve_app.bench.models import bench_model
from serve_app.bench.processes import find_work
from serve_app.bench.progress import Progress
from serve_app.bench.report import Row, report
from serve_app.bench.whole import WholePipeline
from serve_app.commands.local import private_serve
from serve_app.config.app import AppConfig
from serve_app.config.serve_file import parse_app_config

STAGE = {"num_cpus": 0.1, "torch_threads": 1}
STAGES, AGAIN, WHOLE = "three stages", "three stages, again", "whole pipeline"
SETTLE_S = 5.0
"""Wait after Ray's start, in which it prestarts workers."""
APP = "ready"
NAMES = {
    "cluster.fork_server": "fork server",
    "cluster.forked_worker": "who asked it",
    ":Encoder": "encoder",
    ":Transformer": "transformer",
    ":Vae": "VAE",
    ":Ingress": "ingress",
    ":WholePipeline": "pipeline",
    "ray::ServeController": "Serve controller",
}
"""Names of processes, by a part of their titles. All other processes of Ray are "other"."""

Seconds = dict[tuple[str, str], float]
"""Seconds by process and figure: begun_s and cpu_s; for the process "all", cpu_s and ready_s."""


def run(*, model: str, num_rounds: int, json_file: Path | None) -> None:
    """Reports rows of `design`, `process`, `begun_s`, `cpu_s`, `ready_s`, `ratio`: medians over the rounds."""
    rounds: dict[str, list[Seconds]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        config = parse_app_config(
            {
                "model": bench_model(model, Path(folder)).model_dump(),
                "encoder": STAGE | {"max_sequence_length": 16},
                "transformer": STAGE,
                "vae": STAGE,
            }
        )
        for _ in progress.track(range(num_rounds), description="rounds"):
            with private_serve():
                time.sleep(SETTLE_S)
                for design in (STAGES, AGAIN):
                    rounds[design].append(_measure(lambda: build_app(config)))
            with private_serve():
                time.sleep(SETTLE_S)
                rounds[WHOLE].append(_measure(lambda: _whole(config)))
    report(f"from deploying to ready, FLUX ({model})", _rows(rounds), json_file)


def _whole(config: AppConfig) -> Application:
    return serve.deployment(WholePipeline).options(ray_actor_options={"num_cpus": 0.1}).bind(config)


def _rows(rounds: Mapping[str, list[Seconds]]) -> list[Row]:
    medians = {design: _medians(each) for design, each in rounds.items()}
    whole_s = medians[WHOLE]["all", "ready_s"]
    rows: list[Row] = []
    for design, seconds in medians.items():
        for process in dict.fromkeys(name for name, _ in seconds):
            row: dict[str, str | int | float] = {"design": design, "process": process}
            row.update({figure: value for (name, figure), value in seconds.items() if name == process})
            if process == "all":
                row["ratio"] = seconds["all", "ready_s"] / whole_s
            rows.append(row)
    return rows


def _medians(rounds: list[Seconds]) -> Seconds:
    keys = dict.fromkeys(key for each in rounds for key in each)
    return {key: statistics.median(each[key] for each in rounds if key in each) for key in keys}


def _measure(build: Callable[[], Application]) -> Seconds:
    """Deploys the app and measures until Serve reports it as running, that is, until every replica is built.

    Raises RuntimeError if it cannot be deployed.
    """
    before, began = find_work(), time.clock_gettime(time.CLOCK_BOOTTIME)
    # Serve's own wait polls every few seconds only.
    serve.run_many([serve.RunTarget(build(), name=APP, route_prefix=None)], wait_for_applications_running=False)
    while (status := serve.status().applications[APP].status) != "RUNNING":
        if status == "DEPLOY_FAILED":
            raise RuntimeError(f"not deployed: {serve.status().applications[APP]}")
        time.sleep(0.1)
    ready_s = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    seconds: Seconds = {}
    for pid, work in find_work().items():
        name = next((name for part, name in NAMES.items() if part in work.title), "other")
        earlier_s = before[pid].cpu_s if pid in before else 0.0
        key = (name, "cpu_s")
        seconds[key] = seconds.get(key, 0.0) + work.cpu_s - earlier_s
        if pid not in before:
            begun_s = work.begun_s - began
            seconds[name, "begun_s"] = min(begun_s, seconds.get((name, "begun_s"), begun_s))
    seconds["all", "cpu_s"] = sum(value for (_, figure), value in seconds.items() if figure == "cpu_s")
    seconds["all", "ready_s"] = ready_s
    serve.delete(APP)
    return seconds
