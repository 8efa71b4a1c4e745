"""Config to Serve application."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.exceptions import RayServeException

from cluster.nodes import is_alone
from cluster.serve_options import HEAD_NODE, HEALTH_CHECKS, Sleeping, plan_serve_options
from deployments.config import ModelConfig
from deployments.encoder import Encoder
from deployments.stages.preload import plan_preload
from deployments.transformer import Transformer
from deployments.vae import Vae
from deployments.warm_up import WarmUp
from serve_app.auth.counter import build_counter
from serve_app.auth.proxies import check_listening
from serve_app.config import AppConfig, ConfigError, ServedModelConfig, deployed_name, parse_app_config
from serve_app.config_check import check_requests, plan_warm_up
from serve_app.files import check_files, resolve_family
from serve_app.ingress import Ingress
from serve_app.room import check_room
from serve_app.validation import Validator

DEPLOYMENTS: Mapping[str, type] = {"encoder": Encoder, "transformer": Transformer, "vae": Vae}


class Refused(RayServeException, ConfigError):  # type: ignore[misc]
    """What Serve prints as it is; of any other error it prints several tracebacks, and tries four times."""


def build_app(args: AppConfig | Mapping[str, Any]) -> Application:
    """For Serve: `import_path: serve_app.app:build_app` in YAML, with its `args`.

    The annotation is no class, so Serve gives what the YAML says, and mistakes are told in words of ours.
    Raises Refused: one line per mistake.
    """
    try:
        return compose_app(args if isinstance(args, AppConfig) else parse_app_config(args))
    except ConfigError as error:
        raise Refused("\n".join(f"ConfigError: {line}" for line in str(error).splitlines())) from None


def compose_app(config: AppConfig) -> Application:
    """The ingress, and three deployments of each served model, or less of one that shares some with another.

    Raises ConfigError, also if files are not whole, or the cluster has too few CPUs or GPUs or too small ones.
    """
    config = resolve_family(config)
    try:
        check_listening(config.access)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_requests(config)
    if is_alone():
        check_files(config)
    check_room(config)
    return build_ingress(config).bind(config.limits, *_bind(config), jobs=config.jobs, **bind_access(config))


ToldModel = tuple[ModelConfig, tuple[Application, ...], tuple[str, ...]]
"""What the ingress is told of one: itself, its stages, and names of those that take turns with other models'."""


def _bind(config: AppConfig) -> list[ToldModel]:
    """Every stage once, whichever models share it."""
    models = {served.name: served.model.with_vae_dtype(served.vae.dtype) for served in config.served}
    warm_ups: dict[str, WarmUp] = {}
    for served in config.served:
        with config.naming(served):
            planned = plan_warm_up(models[served.name], config.limits)
            warm_ups[served.name] = WarmUp(planned, served.encoder.max_sequence_length)
    bound = {}
    for served in config.served:
        for stage in (stage for stage, holder in served.holders.items() if holder == served.name):
            sharing = [of.name for of in config.served if of.holders[stage] == served.name]
            others = [(models[name], warm_ups[name]) for name in sharing if name != served.name]
            deployment = _deployment(served, stage, config, models[served.name])
            arguments = (models[served.name], served.stages[stage], warm_ups[served.name])
            bound[served.name, stage] = deployment.bind(*arguments, *([others] if others else []))
    return [
        (
            models[served.name],
            tuple(bound[holder, stage] for stage, holder in served.holders.items()),
            () if config.is_one else _sleepers(served),
        )
        for served in config.served
    ]


def _deployment(served: ServedModelConfig, stage: str, config: AppConfig, model: ModelConfig) -> Deployment:
    stage_config = served.stages[stage]
    suffix = "" if config.is_one else f"_{deployed_name(served.name)}"
    options = plan_serve_options(
        stage_config,
        graceful_shutdown_timeout_s=config.limits.request_timeout_s,
        num_shards=stage_config.num_ranks,
        reports_load=stage_config.reports_load,
        has_sessions=stage_config.has_sessions,
        preload=plan_preload(model, stage_config),
        sleeping=Sleeping(
            served.name,
            tuple(DEPLOYMENTS[name].__name__ + suffix for name in _sleepers(served)),
            starts_asleep=served.name != config.served[0].name,
        ),
    )
    deployment = DEPLOYMENTS[stage]
    return serve.deployment(deployment).options(name=deployment.__name__ + suffix, **options)


def _sleepers(served: ServedModelConfig) -> tuple[str, ...]:
    return tuple(name for name, stage in served.stages.items() if not stage.min_replicas)


def bind_access(config: AppConfig) -> dict[str, Any]:
    """What the ingress is to be bound to besides: who may ask, and what counts for all ingresses what they use."""
    auth = config.auth
    counter = None if auth is None else build_counter(auth, _ingress_options(config))
    return {"access": config.access, "key_counter": counter}


def build_ingress(config: AppConfig) -> Deployment:
    """What is to be bound to the three stages."""
    return serve.deployment(serve.ingress()(Ingress)).options(
        num_replicas=config.ingress.num_replicas,
        # room beyond those in progress: for 429s, and for whoever asks how it goes
        max_ongoing_requests=2 * config.limits.max_concurrent_requests,
        **HEALTH_CHECKS,
        max_surge_percent=100,  # on a redeploy the old ones serve until the new ones can: they need no GPU
        graceful_shutdown_timeout_s=config.limits.request_timeout_s,
        ray_actor_options=_ingress_options(config),
    )


def _ingress_options(config: AppConfig) -> dict[str, Any]:
    resources = HEAD_NODE if config.ingress.on_head else {}
    return {"num_cpus": config.ingress.num_cpus, "resources": resources}


def build_validator(config: AppConfig) -> Validator:
    """What this app's ingress will judge requests for the first model by."""
    return Validator(resolve_family(config).served[0].model, config.limits)
