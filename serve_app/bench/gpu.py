"""Measures the memory techniques at published model sizes, each against its bound, on one GPU without a network.

Bounds are the figures of the guides that our users follow: diffusers' on compiling and offloading quantised models
(FLUX.1-dev, RTX 4090; peak memory, and 32.6 s against 25.8 s compiled), DiffSynth-Studio's on Qwen-Image. Their GB
are GiB. Every way runs in its own process, those with a bound first. Each model has a share of the time: when that
is over, the way that is running is cut off, and the remaining ones are left out.
"""

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from deployments.config.model import ModelConfig
from serve_app.bench.large import MEMORY_FOLDER, PUBLISHED, write_large
from serve_app.bench.memory import Stages, measure
from serve_app.bench.memory_case import GPU, HAS_GPU
from serve_app.bench.report import Row, report

GIB_PER_MIB = 1 / 1024


@dataclass(frozen=True)
class Way:
    """One combination of techniques, and its bounds."""

    stages: Stages
    most_gib: float | None = None
    """Most memory that all three stages together may allocate on the GPU, including activations."""
    faster_than: tuple[str, float] | None = None
    """(another way, how many times as fast as that this one must be)"""
    limit_gib: float | None = None
    """Most memory that the denoiser's weights may take on the GPU."""

    @property
    def published(self) -> str:
        """The figure that the guide has published."""
        told = [] if self.most_gib is None else [f"{self.most_gib:g} GiB"]
        if self.faster_than is not None:
            told.append("{1:g} times as fast as {0}".format(*self.faster_than))
        return ", ".join(told) or "-"


def _ways(everywhere: Mapping[str, Any] | None = None, **stages: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the stages' settings, in bf16. A stage's own settings are added to `everywhere`, and override it."""
    return {
        name: {"dtype": "bfloat16"} | dict(everywhere or {}) | dict(stages.get(name, {}))
        for name in ("encoder", "transformer", "vae")
    }


_T5_NF4 = {"quantization": {"kind": "nf4", "components": ["text_encoder_2"]}, "max_sequence_length": 512}
_NF4 = {"quantization": "nf4"}
_OFFLOAD = {"offload": "model"}
_FP8 = {"layerwise_casting": True}

FLUX: Mapping[str, Way] = {
    "nf4": Way(_ways(encoder=_T5_NF4, transformer=_NF4), most_gib=14.9),
    "nf4, model offload": Way(_ways(_OFFLOAD, encoder=_T5_NF4, transformer=_NF4), most_gib=12.2),
    "nf4, time sharing": Way(_ways({"time_sharing": True}, encoder=_T5_NF4, transformer=_NF4), most_gib=12.2),
    "nf4, compile": Way(
        _ways(encoder=_T5_NF4, transformer=_NF4 | {"compile": True}), most_gib=14.9, faster_than=("nf4", 1.26)
    ),
    "nf4, compile, model offload": Way(
        _ways(_OFFLOAD, encoder=_T5_NF4, transformer=_NF4 | {"compile": True}), most_gib=12.2
    ),
    "bf16": Way(_ways()),
    "bf16, compile": Way(_ways(transformer={"compile": True})),
    "bf16, time sharing": Way(_ways({"time_sharing": True})),
    "fp8 storage": Way(_ways(transformer=_FP8)),
}


def _limited(limit_gib: float, **transformer: Any) -> Way:
    stages = _ways(_OFFLOAD, transformer={"offload": "none", "vram_limit_gib": limit_gib} | transformer)
    return Way(stages, limit_gib=limit_gib)


QWEN_IMAGE: Mapping[str, Way] = {
    "model offload": Way(_ways(_OFFLOAD), most_gib=40),
    "fp8 storage, model offload": Way(_ways(_OFFLOAD | _FP8, vae={"layerwise_casting": False}), most_gib=21),
    "vram limit 4": _limited(4),
    "vram limit 16": _limited(16),
    "vram limit 40": _limited(40),
    "vram limit 16, fp8": _limited(16, layerwise_casting=True),
    "vram limit 16, files": _limited(16, host_copy="files"),
    "time sharing": Way(_ways({"time_sharing": True}), most_gib=40),
    "nf4": Way(_ways(transformer=_NF4)),
}
WAYS = {"flux": FLUX, "qwen-image": QWEN_IMAGE}
NUM_STEPS = {"flux": 8, "qwen-image": 4}
NUM_PICTURES = {"flux": 2, "qwen-image": 1}
WRITING = "writing the checkpoint"
SHARES = {"flux": 0.45, "qwen-image": 0.55}
"""Each model's share of the time if both run. Much of it goes into writing checkpoints, loading, and warm-up."""

MOST_OF_TIME = 0.4
"""Largest share of a model's time for one way, so that the others get some."""


def run(families: tuple[str, ...], *, is_quick: bool, limit_s: float, json_file: Path | None) -> None:
    """Runs all ways of these models and reports their rows.

    is_quick: uses tiny checkpoints and two steps at 64 x 64, on the CPU if need be, to check that everything runs.
    """
    began = time.monotonic()
    rows: list[Row] = []
    share = 0.0
    for family in families:
        share += SHARES[family] / sum(SHARES[name] for name in families)
        Console().print(f"writing {family}: {time.monotonic() - began:.0f} s")
        rows += _run_one(family, is_quick=is_quick, deadline=began + share * limit_s)
        if json_file is not None:
            json_file.write_text(json.dumps(rows, indent=1))  # in case the next family is cut off
    report("memory techniques at published sizes" if not is_quick else "quick", rows, json_file)


def _run_one(family: str, *, is_quick: bool, deadline: float) -> list[Row]:
    """Writes the family's checkpoint, runs its ways, and deletes the checkpoint."""
    in_memory = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() and os.access(MEMORY_FOLDER, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="latent-relay-") as folder,
        tempfile.TemporaryDirectory(prefix="latent-relay-", dir=in_memory) as memory,
    ):
        try:
            sizes = {"transformer": {}} if is_quick else PUBLISHED[family]
            place = None if in_memory is None else Path(memory)
            write_large(
                family,
                Path(folder) / family,
                sizes,
                GPU or torch.device("cpu"),
                in_memory=place,
                deadline=deadline,
            )
        except Exception as error:  # must not lose the other family's rows
            return [_row(family, WRITING, Way({}), {WRITING: {"error": f"{type(error).__name__}: {error}"}})]
        return _run_family(_model(family, Path(folder) / family, is_quick), family, is_quick, deadline)


def _model(family: str, folder: Path, is_quick: bool) -> ModelConfig:
    pixels = 64 if is_quick else 1024
    defaults = {"width": pixels, "height": pixels}
    return ModelConfig.model_validate(
        {"name": family, "checkpoint": str(folder), "family": family, "defaults": defaults}
    )


def _run_family(model: ModelConfig, family: str, is_quick: bool, deadline: float) -> list[Row]:
    measured: dict[str, Mapping[str, Any]] = {}
    most_s = MOST_OF_TIME * (deadline - time.monotonic())
    for name, way in WAYS[family].items():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            measured[name] = {"error": "left out, because no time was left"}
            continue
        case = {
            "model": model.model_dump(),
            "stages": way.stages,
            "pictures": 1 if is_quick else NUM_PICTURES[family],
            "steps": 2 if is_quick else NUM_STEPS[family],
        }
        measured[name] = measure(case, timeout_s=min(left_s, most_s))
        Console().print(f"{family}, {name}: {json.dumps(measured[name])}")
    return [_row(family, name, way, measured) for name, way in WAYS[family].items()]


def _row(family: str, name: str, way: Way, measured: Mapping[str, Mapping[str, Any]]) -> Row:
    of = measured[name]
    return {
        "model": family,
        "way": name,
        "load_s": of.get("load_s", "-"),
        "p50_s": of.get("p50_s", "-"),
        "published": way.published,
        "peak_gib": of["peak_mib"] * GIB_PER_MIB if "peak_mib" in of else "-",
        "limited_gib": of["limited_mib"] * GIB_PER_MIB if "limited_mib" in of else "-",
        "switching_s": of.get("switching_s", "-"),
        "holds": "-" if "error" in of or not HAS_GPU else judge(way, of, measured),
        "error": of.get("error", ""),
    }


def judge(way: Way, of: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns "yes" if all bounds hold, or those that were missed, or "-" if there are none."""
    checks: list[tuple[bool, str]] = []
    if way.most_gib is not None:
        peak = of["peak_mib"] * GIB_PER_MIB
        checks.append((peak <= way.most_gib, f"{peak:.1f} GiB, but at most {way.most_gib:g} allowed"))
    if way.limit_gib is not None:
        weights = of["limited_mib"] * GIB_PER_MIB
        checks.append(
            (weights <= way.limit_gib, f"{weights:.1f} GiB of weights, but at most {way.limit_gib:g} allowed")
        )
    if way.faster_than is not None:
        other, times = way.faster_than
        if "p50_s" not in measured[other]:
            return f"{other} did not run"
        ratio = measured[other]["p50_s"] / of["p50_s"]
        checks.append((ratio >= times, f"{ratio:.2f} times as fast as {other}, but at least {times:g} required"))
    missed = [text for has_held, text in checks if not has_held]
    return "; ".join(missed) or ("yes" if checks else "-")
