"""Measures a few ratios and fails if performance has regressed. Ratios, because seconds depend on the machine.

A figure that depends on times is measured again if it fails, and its best value counts; an exact figure is
measured once. A figure that cannot be measured fails, too.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

from deployments.answers import DecodeArguments
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.stages import load_stage
from serve_app.bench.gate_history import fingerprint_here, read_history, write_history
from serve_app.bench.gate_rule import Limit, better_of, find_fault
from serve_app.bench.models import bench_model, bench_request, fail
from serve_app.bench.overhead import NUM_TEXT_TOKENS, compare_with_plain
from serve_app.bench.pipeline import Load, paced_replica, private_ray
from serve_app.bench.report import Row, report

NUM_STEPS = 8
NUM_PICTURES = 12
NUM_AT_ONCE = 8
NUM_ROUNDS = 4
STEP_MS, NUM_PACED_STEPS, SMALL_MB, LARGE_MB = 20.0, 10, 0.4, 8.0
MAX_ATTEMPTS = 3
console = Console(stderr=True)

Figures = Mapping[str, float]
LIMITS: Mapping[str, Limit] = {
    "engine_over_plain": Limit("lower", worst=1.4, relative=0.15, absolute=0.15),
    "merging_speedup_at_8": Limit("higher", worst=1.5, relative=0.2, absolute=0.3),
    "merging_difference": Limit("lower", worst=1e-4, relative=1.0, absolute=1e-4),
    "two_shards_efficiency": Limit("higher", worst=0.75, relative=0.1, absolute=0.1),
    "two_shards_efficiency_8mb": Limit("higher", worst=0.7, relative=0.1, absolute=0.1),
    "ring_bytes_over_payload": Limit("lower", worst=1.02, relative=0.001, absolute=0.001),
}
EXACT = {"merging_difference", "ring_bytes_over_payload"}
"""Figures without noise, whose first measurement counts."""


@dataclass(frozen=True)
class Measurement:
    """Figures that are measured together."""

    names: tuple[str, ...]
    measure: Callable[[], Figures]


def run(*, history_file: Path, keeps: bool, json_file: Path | None) -> bool:
    """Returns whether all figures pass.

    Reports rows of `figure`, `value`, `worst`, `median_before`, `runs_before`, `verdict`. keeps: a run in which
    all pass is added to the history, against which later runs are compared.
    """
    history, fingerprint = read_history(history_file), fingerprint_here()
    earlier = {name: history.earlier(name, fingerprint) for name in LIMITS}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for measurement in _measurements(bench_model("tiny", Path(folder))):
            figures |= measure_until_good(measurement, earlier)
    faults = {name: find_fault(figures.get(name), LIMITS[name], earlier[name]) for name in LIMITS}
    report("the gate", [_row(name, figures, earlier[name], fault) for name, fault in faults.items()], json_file)
    if not any(earlier.values()):
        console.print(
            "the history has no run of this machine and these versions: only static limits apply", style="yellow"
        )
    for name, fault in faults.items():
        if fault is not None:
            console.print(f"{name} {fault}", style="red")
    if keeps and not any(faults.values()):
        write_history(history.with_run(figures), history_file)
    return not any(faults.values())


def measure_until_good(measurement: Measurement, earlier: Mapping[str, list[float]]) -> Figures:
    """Returns the best values of up to MAX_ATTEMPTS attempts; without figures that could not be measured."""
    best: dict[str, float] = {}
    for attempt in range(MAX_ATTEMPTS):
        try:
            measured = measurement.measure()
        except Exception as error:  # the figure's absence then fails the gate
            console.print(f"{', '.join(measurement.names)}: {error!r}", style="red")
            measured = {}
        for name in measurement.names:
            is_first = attempt == 0 or name not in EXACT
            value = better_of(measured.get(name), best.get(name), LIMITS[name]) if is_first else best.get(name)
            if value is not None:
                best[name] = value
        if not any(find_fault(best.get(name), LIMITS[name], earlier[name]) for name in measurement.names):
            break
    return best


def _row(name: str, figures: Figures, earlier: list[float], fault: str | None) -> Row:
    return {
        "figure": name,
        "value": figures.get(name, "absent"),
        "worst": LIMITS[name].worst,
        "median_before": statistics.median(earlier) if earlier else "-",
        "runs_before": len(earlier),
        "verdict": "good" if fault is None else "fails",
    }


def _measurements(model: ModelConfig) -> list[Measurement]:
    torch.set_num_threads(1)
    return [
        Measurement(("engine_over_plain",), lambda: _measure_engine(model)),
        Measurement(("merging_speedup_at_8", "merging_difference"), lambda: measure_merging(model)),
        Measurement(
            ("two_shards_efficiency", "two_shards_efficiency_8mb", "ring_bytes_over_payload"), measure_shards
        ),
    ]


def _measure_engine(model: ModelConfig) -> Figures:
    return {"engine_over_plain": compare_with_plain(model, NUM_PICTURES, NUM_STEPS)}


def measure_merging(model: ModelConfig) -> Figures:
    """Runs eight requests at once, merged and unmerged in turn; also compares their latents.

    Measures processor time, which does not change when eight threads compete for cores.
    """
    request = bench_request(model, NUM_STEPS)
    encodings = load_stage("encode", model, EncoderConfig(max_sequence_length=NUM_TEXT_TOKENS)).encode(request)
    requests = [replace(request, seed=seed) for seed in range(NUM_AT_ONCE)]
    with (
        _stage(model, NUM_AT_ONCE) as merging,
        _stage(model, 1) as alone,
        ThreadPoolExecutor(NUM_AT_ONCE) as threads,
    ):

        def draw(stage: Any) -> tuple[float, list[torch.Tensor]]:
            def one(request: Any) -> DecodeArguments:
                seat = stage.join()
                try:
                    drawn: DecodeArguments = stage.denoise(seat, encodings, request)
                    return drawn
                finally:
                    stage.leave(seat)

            began = time.process_time()
            drawn = list(threads.map(one, requests))
            return time.process_time() - began, [each.latents for each in drawn]

        rounds = [(draw(alone), draw(merging)) for _ in range(1 + NUM_ROUNDS)][1:]
    apart_s, together_s = (min(taken_s for taken_s, _ in each) for each in zip(*rounds, strict=True))
    apart, together = (torch.stack(latents) for _, latents in rounds[0])
    return {
        "merging_speedup_at_8": apart_s / together_s,
        "merging_difference": float((apart - together).abs().max()),
    }


@contextmanager
def _stage(model: ModelConfig, max_batch_size: int) -> Iterator[Any]:
    stage = load_stage("denoise", model, TransformerConfig(max_batch_size=max_batch_size))
    stage.connect(None, fail)
    yield stage
    stage.close()


def measure_shards() -> Figures:
    """Runs four requests over two shards that sleep and pass on small or large tensors; counts rank 0's bytes."""
    load = Load()
    num_forwards = load.num_forwards(2, NUM_PACED_STEPS)
    with private_ray(), paced_replica(2) as replica:

        def seconds(payload_mb: float) -> float:
            taken_s: float = ray.get(replica.in_flight.remote(STEP_MS, payload_mb, NUM_PACED_STEPS, load))
            return taken_s

        seconds(SMALL_MB)
        small_s, large_s = (min(seconds(mb) for _ in range(2)) for mb in (SMALL_MB, LARGE_MB))
        before = ray.get(replica.bytes_sent.remote())
        seconds(LARGE_MB)
        sent = ray.get(replica.bytes_sent.remote()) - before
    ideal_s = load.num_slots(2, NUM_PACED_STEPS) * STEP_MS / 1e3
    return {
        "two_shards_efficiency": ideal_s / small_s,
        "two_shards_efficiency_8mb": ideal_s / large_s,
        "ring_bytes_over_payload": sent / (num_forwards * LARGE_MB * 1e6),
    }
