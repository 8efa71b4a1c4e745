"""A whole application planned on given GPUs, or proposed for them: its models share room, and what is the same."""

from collections.abc import Mapping
from itertools import combinations

from cluster.inventory import Gpu
from deployments.checkpoints.sharing import check_same
from deployments.checkpoints.source import is_tiny
from deployments.config import ModelConfig
from deployments.plan.advice import Admitted
from deployments.plan.plan import Plan, SizesOf, StageConfigs, plan
from deployments.plan.profile import Profile
from deployments.plan.propose import propose
from deployments.plan.several import ModelNeeds, place_beside
from deployments.plan.sizes import largest
from deployments.request import MediaSize
from serve_app.config import AppConfig, LimitsConfig, ServedModelConfig
from serve_app.files import STAGES, is_here, shared_stages

Sizes = Mapping[str, tuple[MediaSize, ...]]
"""Of media, by model."""


def stages_of(served: ServedModelConfig) -> StageConfigs:
    return StageConfigs(served.encoder, served.transformer, served.vae)


def plan_app(
    app: AppConfig, sizes_of: Mapping[str, SizesOf], gpus: tuple[Gpu, ...], profile: Profile | None
) -> list[Plan]:
    """One for each model, beside what of the others is always there. Raises as `plan`."""
    needs = [
        ModelNeeds(served.name, stages_of(served), sizes_of[served.name](stages_of(served)), shared_stages(served))
        for served in app.served
    ]
    beside = place_beside(needs, gpus)
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
        for of, served in zip(needs, app.served, strict=True)
        if of.sizes is not None
    ]


def propose_app(
    app: AppConfig,
    sizes: Sizes,
    sizes_of: Mapping[str, SizesOf],
    gpus: tuple[Gpu, ...],
    profile: Profile | None,
) -> AppConfig:
    """Each model as if it were alone; then shared what is the same, and where there is no room for all of them at
    once, their stages sleep and come with use. Raises DoesNotFit."""
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
    """With each stage that an earlier model has as well, where the files of both are here to tell."""
    found = {served.name: served for served in models}
    for (holder, other), name in [(p, n) for p in combinations(found, 2) for n in ("encoder", "vae")]:
        of, stage = found[holder], found[holder].stages[name]
        is_decided = of.holders[name] != holder or found[other].holders[name] != other
        if is_decided or not all(is_here(each.model) or is_tiny(each.model.layout) for each in (of, found[other])):
            continue
        try:
            check_same(of.model, found[other].model, STAGES[name], stage.dtype)
        except (ValueError, OSError):  # another, or not to be had here
            continue
        shared = stage.model_copy(update={"shared_with": holder})
        found[other] = found[other].model_copy(update={name: shared})
    return list(found.values())


def _sleeping(models: tuple[ServedModelConfig, ...]) -> list[ServedModelConfig]:
    """But for what several share."""
    kept = {(holder, name) for of in models for name, holder in of.holders.items() if holder != of.name}
    return [
        served.model_copy(
            update={
                name: stage.model_copy(update={"min_replicas": 0})
                for name, stage in served.stages.items()
                if served.holders[name] == served.name and (served.name, name) not in kept
            }
        )
        for served in models
    ]


def _limits(sizes: list[MediaSize]) -> LimitsConfig:
    """No request that is larger than what is planned for."""
    pixels = max(size.width * size.height for size in sizes)
    return LimitsConfig(max_pixels=pixels, max_num_frames=max(size.num_frames for size in sizes))


def _drawing(model: ModelConfig, size: MediaSize) -> ModelConfig:
    """By default what was planned for: the limits may admit no more."""
    if size == model.default_size:
        return model
    num_frames = size.num_frames if model.architecture.media == "video" else None
    said = {"width": size.width, "height": size.height, "num_frames": num_frames}
    return model.model_copy(update={"defaults": model.defaults.model_copy(update=said)})


def _admitted(app: AppConfig, model: ModelConfig) -> Admitted:
    limits, own = app.limits, model.geometry.sizes
    most = max((width * height for width, height in own), default=limits.max_pixels)
    return Admitted(limits.max_concurrent_requests, min(limits.max_pixels, most), limits.max_num_frames)
