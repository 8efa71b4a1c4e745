"""The gate's earlier runs, in a file beside the code, with the machine and versions that make them comparable."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cluster.machines.machine import describe_machine
from serve_app.bench.gate_rule import NUM_RUNS

WORKLOAD = "1"
"""Version of the measurements. Change it when they change, so that older runs no longer count."""
COMPARABLE = ("processor", "cores", "gpus", "python", "torch", "diffusers", "transformers", "ray")


class GateRun(BaseModel):
    """One kept run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: str
    fingerprint: dict[str, str]
    figures: dict[str, float]


class GateHistory(BaseModel):
    """The kept runs, oldest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: tuple[GateRun, ...] = ()

    def earlier(self, name: str, fingerprint: Mapping[str, str]) -> list[float]:
        """Returns the figure's values in comparable runs, oldest first."""
        same = [run for run in self.runs if run.fingerprint == fingerprint]
        return [run.figures[name] for run in same if name in run.figures]

    def with_run(self, figures: Mapping[str, float]) -> "GateHistory":
        """Returns the history with one more run. Only the last NUM_RUNS runs of this fingerprint are kept."""
        fingerprint = fingerprint_here()
        run = GateRun(date=describe_machine()["date"], fingerprint=fingerprint, figures=dict(figures))
        same = [each for each in self.runs if each.fingerprint == fingerprint]
        dropped = same[: max(0, len(same) + 1 - NUM_RUNS)]
        return GateHistory(runs=(*(each for each in self.runs if each not in dropped), run))


def fingerprint_here() -> dict[str, str]:
    machine = describe_machine()
    return {"workload": WORKLOAD} | {name: machine[name] for name in COMPARABLE}


def read_history(file: Path) -> GateHistory:
    """Reads the history; it is empty if the file does not exist."""
    return GateHistory.model_validate_json(file.read_bytes()) if file.exists() else GateHistory()


def write_history(history: GateHistory, file: Path) -> None:
    file.write_text(json.dumps(history.model_dump(), indent=1) + "\n")
