"""Derives the family of pipelines without an entry in `families`, in a child process, because that needs torch."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from deployments.checkpoints.packages import describe_missing, is_public
from deployments.families import FAMILIES, Call, Family, Geometry
from deployments.families.calls import find_calls
from deployments.families.geometry import Configs
from deployments.families.sources import REQUIRED
from deployments.request import CallKind

DERIVE = "deployments.stages.trials.derive"
MUST_END_IN_S = 300.0


@cache
def derive_family(folder: Path, pipeline_class: str) -> tuple[Family, Geometry]:
    """Returns the family and geometry of the checkpoint in this folder. Takes some seconds.

    The folder needs only configs. Raises ValueError if the pipeline cannot be served.
    """
    try:
        _check_class(pipeline_class)
    except ValueError as error:
        raise _underivable(folder, pipeline_class, str(error)) from error
    if missing := describe_missing(pipeline_class):
        raise ValueError(f"{folder}: {missing}")
    command = [sys.executable, "-m", DERIVE, str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=MUST_END_IN_S, env=environment, check=False
    )
    if ran.returncode:
        raise _underivable(folder, pipeline_class, (ran.stderr.strip() or "no reason given").splitlines()[-1])
    return read_derived(pipeline_class, json.loads(ran.stdout.splitlines()[-1]))


def read_derived(pipeline_class: str, told: Mapping[str, Any]) -> tuple[Family, Geometry]:
    """Reads the output of `Derived.describe` (stages/trials/derive.py)."""
    own = dict(told)
    geometry = Geometry(**own.pop("geometry"))
    calls: dict[CallKind, Call] = {call["kind"]: _read_call(call) for call in own.pop("calls", ())}
    family = Family(
        name=pipeline_class,
        pipeline_class=pipeline_class,
        geometry=partial(_given, geometry),
        published={},
        told=calls or None,
        **own,
    )
    return family, geometry


def tell_calls(calls: Mapping[CallKind, Call]) -> list[dict[str, Any]]:
    """Returns the calls as JSON values, which `read_derived` reads."""
    return [
        {
            "kind": call.kind,
            "pipeline_class": call.pipeline_class,
            "parameters": {name: value for name, value in call.parameters.items() if value is not REQUIRED},
            "required": [name for name, value in call.parameters.items() if value is REQUIRED],
        }
        for call in calls.values()
    ]


def _read_call(told: Mapping[str, Any]) -> Call:
    parameters = told["parameters"] | dict.fromkeys(told["required"], REQUIRED)
    return Call(told["kind"], told["pipeline_class"], parameters)


def _check_class(pipeline_class: str) -> None:
    """Raises ValueError if the installed diffusers has no such class."""
    if not pipeline_class.endswith("ModularPipeline"):
        find_calls(pipeline_class)
    elif not is_public(pipeline_class):
        raise ValueError("the installed diffusers has no class of that name")


def _given(geometry: Geometry, _configs: Configs) -> Geometry:
    return geometry


def _underivable(folder: Path, pipeline_class: str, reason: str) -> ValueError:
    known = ", ".join(f"{family.pipeline_class} ({name})" for name, family in FAMILIES.items())
    return ValueError(
        f"{folder} is a {pipeline_class}, which cannot be served: {reason}. If it runs like one of these, set "
        f"`family:`: {known}"
    )
