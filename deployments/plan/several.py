"""Several models on the same GPUs: who is there at once, and what room is left for each."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.plan.place import Process, place
from deployments.plan.plan import StageConfigs
from deployments.plan.room import room_demands
from deployments.plan.sizes import ModelSizes


@dataclass(frozen=True)
class ModelNeeds:
    """What is to be planned of one model."""

    name: str
    stages: StageConfigs
    sizes: ModelSizes | None
    """None where the GPUs' memory is not known."""
    shared: Collection[Stage] = ()
    """Stages that are another model's."""


def place_beside(models: Sequence[ModelNeeds], gpus: Sequence[Gpu]) -> Mapping[str, tuple[Process, ...]]:
    """By model the processes of the others that are always there: of stages that never sleep, the fewest replicas.

    Those that sleep make room for each other, so each has what these leave.
    """
    awake: dict[str, tuple[Process, ...]] = {}
    for model in models:
        demands = {
            stage: replace(demand, max_replicas=demand.min_replicas)
            for stage, demand in room_demands(model.stages, model.sizes, model.shared).items()
            if demand.min_replicas
        }
        before = [process for processes in awake.values() for process in processes]
        placed = place(demands, gpus, beside=before).processes
        awake[model.name] = tuple(replace(process, model=model.name) for process in placed)
    return {
        model.name: tuple(process for name, of in awake.items() if name != model.name for process in of)
        for model in models
    }
