"""Measures what partial images and progress events cost a lone request, compared with the plain answer.

All requests go over HTTP to one served app, in turn, so that drift of the machine's speed affects all alike. Every
answer is read to its last byte.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.progress import track

from serve_app.bench.models import bench_model
from serve_app.bench.report import Row, report
from serve_app.bench.serving import serving
from serve_app.config.serve_file import read_serve_file

DESIGNS: dict[str, dict[str, Any]] = {
    "plain answer": {},
    "stream": {"stream": True},
    "progress": {"stream": True, "progress": True},
    "3 partial images": {"stream": True, "partial_images": 3},
    "both": {"stream": True, "progress": True, "partial_images": 3},
}


def run(
    config_file: Path,
    *,
    model: str | None,
    port: int,
    num_steps: int | None,
    num_requests: int,
    json_file: Path | None,
) -> None:
    """Reports rows of `design`, `partials` (mean number of partial images), `p50_s` and `ratio` (the median of the
    ratios to the plain answer, request by request).

    model: a name for `bench_model`, in place of the config's model. num_steps: None: the model's default.
    """
    times: dict[str, list[float]] = {design: [] for design in DESIGNS}
    partials: dict[str, list[int]] = {design: [] for design in DESIGNS}
    body = {"prompt": "a red circle"} | ({} if num_steps is None else {"num_inference_steps": num_steps})
    url = f"http://127.0.0.1:{port}"
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(_with_model(config_file, model, Path(folder)), port),
        httpx.Client(base_url=url, timeout=600) as client,
    ):
        for i in track(range(-2, num_requests), description="requests"):
            for design, wishes in DESIGNS.items():
                start = time.perf_counter()
                num_partials = _ask(client, body | wishes | {"seed": 1000 + i})
                if i >= 0:
                    times[design].append(time.perf_counter() - start)
                    partials[design].append(num_partials)
    baseline = times["plain answer"]
    rows: list[Row] = [
        {
            "design": design,
            "partials": statistics.mean(partials[design]),
            "p50_s": statistics.median(of),
            "ratio": statistics.median(a / b for a, b in zip(of, baseline, strict=True)),
        }
        for design, of in times.items()
    ]
    report(f"a lone request with progress and partial images, {model or config_file.stem}", rows, json_file)


def _with_model(config_file: Path, model: str | None, folder: Path) -> Path:
    """Returns the config file, or one in `folder` that serves this model instead."""
    if model is None:
        return config_file
    document = read_serve_file(config_file)
    [application] = document["applications"]
    served = bench_model(model, folder).model_dump(mode="json", exclude_defaults=True)
    application["args"] = {**application["args"], "model": served}
    changed = folder / "serve.yaml"
    changed.write_text(yaml.safe_dump(document))
    return changed


def _ask(client: httpx.Client, body: dict[str, Any]) -> int:
    """Returns how many partial images came before the final one."""
    with client.stream("POST", "/v1/images/generations", json=body) as answer:
        answer.raise_for_status()
        if not body.get("stream"):
            assert json.loads(answer.read())["data"]
            return 0
        names = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert names[-1] == "image_generation.completed", names[-1]
    return names.count("image_generation.partial_image")
