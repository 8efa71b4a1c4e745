"""How long from deploying to ready, and which process works on it: the three stages, and one whole pipeline.

Each on a Ray of its own that has just begun and is idle; the stages then once more on the same, where their fork
server (cluster/fork_server.py) has imported before. The checkpoint was just written, so the kernel still has it:
nobody waits for a disk. Seconds of processor are what to compare on a machine that does other things, too.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from ray import serve
from ray.serve import Application
from rich.progress import Progress

from serve_app.app import build_app
from serve_app.bench.models import bench_model
from serve_app.bench.processes import find_work
from serve_app.bench.report import Row, report
from serve_app.bench.whole import WholePipeline
from serve_app.config import AppConfig, parse_app_config
from serve_app.local import private_serve

STAGE = {"num_cpus": 0.1, "torch_threads": 1}
STAGES, AGAIN, WHOLE = "three stages", "three stages, again", "whole pipeline"
SETTLE_S = 5.0
"""A Ray that has just begun starts workers in advance."""
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
"""Of processes, by what is in their titles. What else Ray has is "other"."""

Seconds = dict[tuple[str, str], float]
"""By process and figure: begun_s, cpu_s; of the process "all" ready_s, too."""


def run(*, model: str, num_rounds: int, json_file: Path | None) -> None:
    """Rows of `design`, `process`, `begun_s`, `cpu_s`, `ready_s`, `ratio`: medians over the rounds."""
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
    """Until Serve calls the app running, which it does when every replica has been built.

    Raises RuntimeError if it cannot be deployed.
    """
    before, began = find_work(), time.clock_gettime(time.CLOCK_BOOTTIME)
    # Serve's own wait looks every few seconds only.
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
