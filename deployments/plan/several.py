"""Plans several models on the same GPUs: which processes run at once, and how much room each model has."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.machines.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.plan.capacity import gpu_demands
from deployments.plan.place import Process, plan_placement
from deployments.plan.plan import StageConfigs
from deployments.plan.sizes import ModelSizes


@dataclass(frozen=True)
class ModelDemands:
    """One model to plan."""

    name: str
    stages: StageConfigs
    sizes: ModelSizes | None
    """None if the GPUs' memory is not known."""
    shared: Collection[Stage] = ()
    """Stages that belong to another model."""


def place_beside(models: Sequence[ModelDemands], gpus: Sequence[Gpu]) -> Mapping[str, tuple[Process, ...]]:
    """Returns, by model, the other models' processes that always run: the fewest replicas of non-sleeping stages.

    Stages that sleep make room for each other, so each model can use the room that these processes leave.
    """
    awake: dict[str, tuple[Process, ...]] = {}
    for model in models:
        demands = {
            stage: replace(demand, max_replicas=demand.min_replicas)
            for stage, demand in gpu_demands(model.stages, model.sizes, model.shared).items()
            if demand.min_replicas
        }
        before = [process for processes in awake.values() for process in processes]
        placed = plan_placement(demands, gpus, beside=before).processes
        awake[model.name] = tuple(replace(process, model=model.name) for process in placed)
    return {
        model.name: tuple(process for name, of in awake.items() if name != model.name for process in of)
        for model in models
    }
