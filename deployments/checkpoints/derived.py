"""Pipelines without an entry in `families`: what they tell of themselves. Another process imports torch for it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from deployments.checkpoints.packages import describe_missing
from deployments.families import FAMILIES, Family, Geometry
from deployments.families.calls import find_calls
from deployments.families.geometry import Configs

DERIVE = "deployments.stages.derive"
MUST_END_IN_S = 300.0


@cache
def derive_family(folder: Path, pipeline_class: str) -> tuple[Family, Geometry]:
    """Of the checkpoint in this folder, which need not have more than configs. Takes some seconds.

    Raises ValueError if its pipeline cannot be served.
    """
    try:
        find_calls(pipeline_class)
    except ValueError as error:
        raise _refusal(folder, pipeline_class, str(error)) from error
    if missing := describe_missing(pipeline_class):
        raise ValueError(f"{folder}: {missing}")
    command = [sys.executable, "-m", DERIVE, str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=MUST_END_IN_S, env=environment, check=False
    )
    if ran.returncode:
        raise _refusal(folder, pipeline_class, (ran.stderr.strip() or "no reason given").splitlines()[-1])
    return read_derived(pipeline_class, json.loads(ran.stdout.splitlines()[-1]))


def read_derived(pipeline_class: str, told: Mapping[str, Any]) -> tuple[Family, Geometry]:
    """What `Derived.describe` (stages/derive.py) has told."""
    own = dict(told)
    geometry = Geometry(**own.pop("geometry"))
    family = Family(
        name=pipeline_class,
        pipeline_class=pipeline_class,
        geometry=partial(_given, geometry),
        published={},
        **own,
    )
    return family, geometry


def _given(geometry: Geometry, _configs: Configs) -> Geometry:
    return geometry


def _refusal(folder: Path, pipeline_class: str, reason: str) -> ValueError:
    known = ", ".join(f"{family.pipeline_class} ({name})" for name, family in FAMILIES.items())
    return ValueError(
        f"{folder} is a {pipeline_class}, which cannot be served: {reason}. If it runs like one of these, set "
        f"`family:`: {known}"
    )
