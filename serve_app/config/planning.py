"""Plans a whole application on given GPUs, or proposes one for them: its models share GPUs, and stages that are
equal."""

from collections.abc import Mapping
from itertools import combinations

from cluster.machines.inventory import Gpu
from deployments.checkpoints.sharing import check_same
from deployments.checkpoints.source import is_tiny
from deployments.config.model import ModelConfig
from deployments.plan.advice import Admitted
from deployments.plan.plan import Plan, SizesOf, StageConfigs, plan
from deployments.plan.profile import Profile
from deployments.plan.propose import propose
from deployments.plan.several import ModelDemands, place_beside
from deployments.plan.sizes import largest
from deployments.request import MediaSize
from serve_app.config.app import AppConfig
from serve_app.config.checkpoint_files import STAGES, is_here, shared_stages
from serve_app.config.limits import LimitsConfig
from serve_app.config.served_model import ServedModelConfig

Sizes = Mapping[str, tuple[MediaSize, ...]]
"""Sizes of images or videos, by model."""


def stages_of(served: ServedModelConfig) -> StageConfigs:
    return StageConfigs(served.encoder, served.transformer, served.vae)


def plan_app(
    app: AppConfig, sizes_of: Mapping[str, SizesOf], gpus: tuple[Gpu, ...], profile: Profile | None
) -> list[Plan]:
    """Returns a plan for each model, beside the parts of the other models that are always loaded. Raises as `plan`
    does."""
    demands = [
        ModelDemands(
            served.name, stages_of(served), sizes_of[served.name](stages_of(served)), shared_stages(served)
        )
        for served in app.served
    ]
    beside = place_beside(demands, gpus)
    return [
        plan(
            of.name,
            of.stages,
            of.sizes,
            gpus,
            profile=profile,
            admitted=_admitted(app, served.model),
            shared=of.shared,
            beside=beside[of.name],
        )
        for of, served in zip(demands, app.served, strict=True)
        if of.sizes is not None
    ]


def propose_app(
    app: AppConfig,
    sizes: Sizes,
    sizes_of: Mapping[str, SizesOf],
    gpus: tuple[Gpu, ...],
    profile: Profile | None,
) -> AppConfig:
    """Proposes each model as if it were alone, then shares equal stages. If the models do not fit at the same
    time, their stages sleep until they are used. Raises DoesNotFit."""
    proposed = []
    for served in app.served:
        most = largest(sizes[served.name])
        stages = propose(sizes_of[served.name], gpus, None if profile is None else profile.at(most))
        told = {"encoder": stages.encoder, "transformer": stages.transformer, "vae": stages.vae}
        proposed.append(served.model_copy(update={"model": _drawing(served.model, most), **told}))
    limits = _limits([most for of in sizes.values() for most in of])
    app = app.serving(_shared(proposed)).model_copy(update={"limits": limits})
    if app.is_one or not any(of.shortfalls for of in plan_app(app, sizes_of, gpus, None)):
        return app
    return app.serving(_sleeping(app.served))


def _shared(models: list[ServedModelConfig]) -> list[ServedModelConfig]:
    """Shares each stage with an earlier model whose stage is equal, if the files of both are here to compare."""
    found = {served.name: served for served in models}
    for (owner, other), name in [(p, n) for p in combinations(found, 2) for n in ("encoder", "vae")]:
        of, stage = found[owner], found[owner].stages[name]
        is_decided = of.owners[name] != owner or found[other].owners[name] != other
        if is_decided or not all(is_here(each.model) or is_tiny(each.model.layout) for each in (of, found[other])):
            continue
        try:
            check_same(of.model, found[other].model, STAGES[name], stage.dtype)
        except (ValueError, OSError):  # the stages differ, or cannot be read here
            continue
        shared = stage.model_copy(update={"shared_with": owner})
        found[other] = found[other].model_copy(update={name: shared})
    return list(found.values())


def _sleeping(models: tuple[ServedModelConfig, ...]) -> list[ServedModelConfig]:
    """Lets all stages sleep except those that several models share."""
    kept = {(owner, name) for of in models for name, owner in of.owners.items() if owner != of.name}
    return [
        served.model_copy(
            update={
                name: stage.model_copy(update={"min_replicas": 0})
                for name, stage in served.stages.items()
                if served.owners[name] == served.name and (served.name, name) not in kept
            }
        )
        for served in models
    ]


def _limits(sizes: list[MediaSize]) -> LimitsConfig:
    """Returns limits that allow no larger request than was planned for."""
    pixels = max(size.width * size.height for size in sizes)
    return LimitsConfig(max_pixels=pixels, max_num_frames=max(size.num_frames for size in sizes))


def _drawing(model: ModelConfig, size: MediaSize) -> ModelConfig:
    """Sets the default size to the planned one, because the limits may allow no more."""
    if size == model.default_size:
        return model
    num_frames = size.num_frames if model.architecture.media == "video" else None
    said = {"width": size.width, "height": size.height, "num_frames": num_frames}
    return model.model_copy(update={"defaults": model.defaults.model_copy(update=said)})


def _admitted(app: AppConfig, model: ModelConfig) -> Admitted:
    limits, own = app.limits, model.geometry.sizes
    most = max((width * height for width, height in own), default=limits.max_pixels)
    return Admitted(limits.max_concurrent_requests, min(limits.max_pixels, most), limits.max_num_frames)
