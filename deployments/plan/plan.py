"""Makes a plan: the memory that a model needs, where it goes, what it can serve, and what to change."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.machines.inventory import Gpu
from deployments.checkpoints.components import Stage
from deployments.config.encoder import EncoderConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.plan.advice import Admitted, advise
from deployments.plan.place import Placement, Process, StageDemand, plan_placement
from deployments.plan.profile import Profile, Times
from deployments.plan.rate import Rate, bound_rate, request_s
from deployments.plan.sizes import ModelSizes, largest


@dataclass(frozen=True)
class StageConfigs:
    """The configs of the three stages."""

    encoder: EncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig

    def by_stage(self) -> Mapping[Stage, StageConfig]:
        return {"encode": self.encoder, "denoise": self.transformer, "decode": self.vae}


SizesOf = Callable[[StageConfigs], ModelSizes]
"""`Description.sizes` for given sizes of media."""


@dataclass(frozen=True)
class Plan:
    """The plan for one model on given GPUs."""

    name: str
    stages: StageConfigs
    sizes: ModelSizes
    placement: Placement
    rate: Rate | None
    """None without a profile."""
    shortfalls: tuple[str, ...]
    """Why the model does not fit; empty if it does."""
    advice: tuple[str, ...]
    auto: tuple[Stage, ...] = ()
    """Stages that have as many replicas as there is room for."""


def demands_of(stages: StageConfigs, sizes: ModelSizes, times: Times | None = None) -> dict[Stage, StageDemand]:
    """Returns the GPUs that the three stages need. times: measured times; None: assumed ones."""
    return {
        stage: StageDemand(
            sizes.stage(stage).ranks,
            config.num_gpus,
            config.min_replicas,
            config.most_replicas,
            request_s(stage, sizes.stage(stage).ranks, times),
            config.is_auto,
        )
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
    """Makes a plan. Raises KeyError if the profile lacks the largest of the requested sizes.

    Args:
        shared: stages that belong to another model, and are planned with it.
        beside: processes of other models that run at the same time.
    """
    times = None if profile is None else profile.at(largest(sizes.sizes))
    if times is not None and times.working_bytes is not None:
        sizes = sizes.with_working(times.working_bytes)
    demands = {stage: demand for stage, demand in demands_of(stages, sizes, times).items() if stage not in shared}
    placement = plan_placement(demands, gpus, beside=beside)
    configs = tuple(stages.by_stage().values())
    return Plan(
        name,
        stages,
        sizes,
        placement,
        None if times is None or shared or beside else bound_rate(placement, times),
        tuple(placement.shortfalls()) if gpus else (),
        advise(sizes, stages.transformer, configs, demands, placement, times, admitted),
        tuple(stage for stage, demand in demands.items() if demand.is_auto and gpus),
    )
