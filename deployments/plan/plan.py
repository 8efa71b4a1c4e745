"""One plan: what is needed, where it goes, what it can serve, what to change."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.config import EncoderConfig, StageConfig, TransformerConfig, VaeConfig
from deployments.plan.advice import Admitted, advise
from deployments.plan.place import Demand, Placement, Process, place
from deployments.plan.profile import Profile
from deployments.plan.rate import Rate, bound_rate
from deployments.plan.sizes import ModelSizes, largest


@dataclass(frozen=True)
class StageConfigs:
    """How the three stages are to run."""

    encoder: EncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig

    def by_stage(self) -> Mapping[Stage, StageConfig]:
        return {"encode": self.encoder, "denoise": self.transformer, "decode": self.vae}


SizesOf = Callable[[StageConfigs], ModelSizes]
"""`Description.sizes`, for some sizes of media."""


@dataclass(frozen=True)
class Plan:
    """For one model on given GPUs."""

    name: str
    stages: StageConfigs
    sizes: ModelSizes
    placement: Placement
    rate: Rate | None
    """None without a profile."""
    shortfalls: tuple[str, ...]
    """Why it does not fit; empty if it does."""
    advice: tuple[str, ...]


def demands_of(stages: StageConfigs, sizes: ModelSizes) -> dict[Stage, Demand]:
    """What the three stages ask of the GPUs."""
    return {
        stage: Demand(sizes.stage(stage).ranks, config.num_gpus, config.min_replicas, config.max_replicas)
        for stage, config in stages.by_stage().items()
    }


def plan(
    name: str,
    stages: StageConfigs,
    sizes: ModelSizes,
    gpus: tuple[Gpu, ...],
    *,
    profile: Profile | None = None,
    admitted: Admitted,
    shared: Collection[Stage] = (),
    beside: Sequence[Process] = (),
) -> Plan:
    """Raises KeyError if the profile lacks the largest of the asked sizes.

    Args:
        shared: stages that are another model's, and planned with it.
        beside: processes of other models that are there at the same time.
    """
    times = None if profile is None else profile.at(largest(sizes.sizes))
    if times is not None and times.working_bytes is not None:
        sizes = sizes.with_working(times.working_bytes)
    demands = {stage: demand for stage, demand in demands_of(stages, sizes).items() if stage not in shared}
    placement = place(demands, gpus, beside=beside)
    configs = tuple(stages.by_stage().values())
    return Plan(
        name,
        stages,
        sizes,
        placement,
        None if times is None or shared or beside else bound_rate(placement, times),
        tuple(placement.shortfalls()) if gpus else (),
        advise(sizes, stages.transformer, configs, demands, placement, times, admitted),
    )
