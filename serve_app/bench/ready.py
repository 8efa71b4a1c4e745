"""How long from deploying to ready: the three stages, and the whole pipeline in one Serve replica.

Each is deployed three times a round on a Ray that runs already, always in new processes: as processes that do
nothing, as processes that only import what the replicas import, and as it is. The differences are what processes,
imports and loading cost. The checkpoint was just written, so the kernel still has it: nobody waits for a disk.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray import serve
from ray.serve import Application
from rich.progress import Progress

from serve_app.app import build_app
from serve_app.bench.importing import Importing
from serve_app.bench.models import bench_model
from serve_app.bench.report import Row, report
from serve_app.bench.whole import WholePipeline
from serve_app.config import AppConfig, parse_app_config
from serve_app.local import private_serve

PIPELINE = "diffusers:FluxPipeline"
IMPORTS = {
    "three stages": (
        ("serve_app.ingress",),
        ("deployments.stages.encode", PIPELINE),
        ("deployments.stages.denoise", PIPELINE),
        ("deployments.stages.decode", PIPELINE),
    ),
    "whole pipeline": (("serve_app.bench.whole", PIPELINE),),
}
"""What each process of a design imports, as `Importing` takes it."""
STAGE = {"num_cpus": 0.1, "torch_threads": 1}


def run(*, model: str, num_rounds: int, json_file: Path | None) -> None:
    """Rows of `design`, `process_s`, `import_s`, `load_s`, `ready_s`: medians over the rounds."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress, private_serve():
        config = parse_app_config(
            {
                "model": bench_model(model, Path(folder)).model_dump(),
                "encoder": STAGE | {"max_sequence_length": 16},
                "transformer": STAGE,
                "vae": STAGE,
            }
        )
        times: dict[str, list[tuple[float, float, float]]] = {design: [] for design in IMPORTS}
        for _ in progress.track(range(num_rounds), description="rounds"):
            for design in IMPORTS:
                times[design].append(_measure(design, config))
        for design, rounds in times.items():
            process_s, imported_s, ready_s = (statistics.median(column) for column in zip(*rounds, strict=True))
            rows.append(
                {
                    "design": design,
                    "process_s": process_s,
                    "import_s": imported_s - process_s,
                    "load_s": ready_s - imported_s,
                    "ready_s": ready_s,
                }
            )
    report(f"from deploying to ready, FLUX ({model})", rows, json_file)


def _measure(design: str, config: AppConfig) -> tuple[float, float, float]:
    """Seconds until ready: of idle processes, of those that import, of the design itself."""
    imports = IMPORTS[design]
    if design == "whole pipeline":
        app = serve.deployment(WholePipeline).options(ray_actor_options={"num_cpus": 0.1}).bind(config)
    else:
        app = build_app(config)
    return (
        _ready_s({f"process {i}": _importing(()) for i in range(len(imports))}),
        _ready_s({f"process {i}": _importing(names) for i, names in enumerate(imports)}),
        _ready_s({design: app}),
    )


def _importing(names: tuple[str, ...]) -> Application:
    return serve.deployment(Importing).options(ray_actor_options={"num_cpus": 0.1}).bind(names)


def _ready_s(applications: Mapping[str, Application]) -> float:
    """Until Serve calls all of them running, which it does when every replica has been built.

    Raises RuntimeError if one cannot be deployed.
    """
    start = time.perf_counter()
    targets = [serve.RunTarget(app, name=name, route_prefix=None) for name, app in applications.items()]
    serve.run_many(targets, wait_for_applications_running=False)  # it would look every few seconds only
    while True:
        states = [status.status for status in serve.status().applications.values()]
        if "DEPLOY_FAILED" in states:
            raise RuntimeError(f"not deployed: {serve.status().applications}")
        if states.count("RUNNING") == len(applications):
            break
        time.sleep(0.05)
    elapsed_s = time.perf_counter() - start
    with ThreadPoolExecutor(len(applications)) as threads:  # Serve takes seconds for each
        list(threads.map(serve.delete, applications))
    return elapsed_s
