"""Measures what every memory technique saves and costs, with one model, each way in its own process.

load_s       seconds until all three stages are loaded
p50_s        seconds of one image, from prompt to pixels, without compilation and first touch
peak_mib     CUDA: peak of allocated memory; CPU: the largest resident set, less that of the bare imports
time_ratio   over the plain pipeline; on the CPU, over one in the same process, image by image in turn
switching_s  seconds per image that loading and unloading weights takes
"""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

from rich.progress import track

from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.load import open_denoisers
from serve_app.bench.frontier import draw_frontier
from serve_app.bench.models import bench_model
from serve_app.bench.report import Row, report

PLAIN = "plain pipeline"
Stages = Mapping[str, Mapping[str, Any]]


def _everywhere(**settings: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(("encoder", "transformer", "vae"), settings)


def _transformer(**settings: Any) -> dict[str, dict[str, Any]]:
    return {"transformer": settings}


WAYS: dict[str, Stages | None] = {
    PLAIN: None,
    "relay": {},
    "bfloat16": _everywhere(dtype="bfloat16"),
    "fp8 storage": _transformer(layerwise_casting=True),
    "int8": _transformer(quantization="int8"),
    "nf4": _transformer(quantization="nf4"),
    "nf4, compile": _transformer(quantization="nf4", compile=True),
    "nf4, model offload": _everywhere(offload="model") | _transformer(quantization="nf4", offload="model"),
    "compile": _transformer(compile=True),
    "model offload": _everywhere(offload="model"),
    "time sharing": _everywhere(time_sharing=True),
    "group offload": _transformer(offload="group"),
    "disk offload": _transformer(offload="disk"),
    "vram limit, half": _transformer(vram_limit_gib=0.5),  # of the transformer's weights
    "vram limit, none": _transformer(vram_limit_gib=0.0),
    "vram limit, half, fp8": _transformer(vram_limit_gib=0.5, layerwise_casting=True),
}
"""Settings per stage that differ from the defaults, by name of the way; None: diffusers' own pipeline."""
QUICK = (PLAIN, "relay", "bfloat16", "group offload", "vram limit, half")


def run(
    *,
    model: str,
    ways: Sequence[str],
    num_pictures: int,
    num_steps: int,
    json_file: Path | None,
    csv_file: Path | None,
    svg_file: Path | None,
) -> None:
    """Reports rows of `way`, `load_s`, `p50_s`, `peak_mib`, and both ratios.

    A way that cannot run here has an `error` instead. model: "tiny", "100M", or any checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = bench_model(model, Path(folder))
        measured = {}
        for way in track(ways, description="memory"):
            case = {
                "model": config.model_dump(),
                "stages": _in_gib(WAYS[way], config),
                "pictures": num_pictures,
                "steps": num_steps,
            }
            measured[way] = measure(case)
    rows = _rows(measured, measured[PLAIN])
    report(f"memory techniques, {model}", rows, json_file)
    if csv_file is not None:
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if svg_file is not None:
        points = {
            str(row["way"]): (float(row["peak_mib"]), float(row["time_ratio"])) for row in rows if not row["error"]
        }
        y_label = "time per image, relative to the plain pipeline"
        svg_file.write_text(draw_frontier(points, x_label="peak memory, MiB", y_label=y_label))


def _rows(measured: Mapping[str, Mapping[str, Any]], plain: Mapping[str, Any]) -> list[Row]:
    return [
        {
            "way": way,
            "load_s": of.get("load_s", "-"),
            "p50_s": of.get("p50_s", "-"),
            "peak_mib": of.get("peak_mib", "-"),
            "time_ratio": of.get("time_ratio", of["p50_s"] / plain["p50_s"]) if "p50_s" in of else "-",
            "memory_ratio": of["peak_mib"] / plain["peak_mib"] if "p50_s" in of else "-",
            "switching_s": of.get("switching_s", "-"),
            "error": of.get("error", ""),
        }
        for way, of in measured.items()
    ]


def measure(case: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
    """Measures one way in its own process, so that it inherits no other's memory. A failure becomes an `error`."""
    command = [sys.executable, "-m", "serve_app.bench.memory_case"]
    with subprocess.Popen(
        command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(json.dumps(case), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"error": f"not done within {timeout_s:g} s"}
        finally:
            with suppress(ProcessLookupError):  # also ends compilers, which hold its output open
                os.killpg(process.pid, signal.SIGKILL)
    try:
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        lines = errors.strip().splitlines() or ["no output"]
        return {"error": f"exit status {process.returncode}: {lines[-1][:200]}"}
    return result


def _in_gib(stages: Stages | None, model: ModelConfig) -> Stages | None:
    """Converts vram_limit_gib in WAYS, a share of the transformer's float32 weights, to GiB."""
    transformer = dict(stages or {}).get("transformer", {})
    if stages is None or "vram_limit_gib" not in transformer:
        return stages
    denoisers = open_denoisers(model, TransformerConfig()).skeletons.values()
    num_bytes = sum(parameter.numel() for denoiser in denoisers for parameter in denoiser.parameters()) * 4
    limit = transformer["vram_limit_gib"] * num_bytes / 2**30
    return {**stages, "transformer": {**transformer, "vram_limit_gib": limit}}
