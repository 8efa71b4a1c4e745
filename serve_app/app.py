"""Builds the Serve application from a config."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import RayServeException

from cluster.machines.nodes import is_single_node
from cluster.replicas.serve_options import HEAD_NODE, HEALTH_CHECKS, ScalingHints, Sleeping, plan_serve_options
from deployments.checkpoints.components import Stage
from deployments.config.model import ModelConfig
from deployments.encoder import Encoder
from deployments.plan.rate import ASSUMED_S
from deployments.stages.preload import plan_preload
from deployments.stages.warm_up import WarmUp
from deployments.transformer import Transformer
from deployments.vae import Vae
from serve_app.auth.counter import build_counter
from serve_app.auth.proxies import check_listening
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.capacity_check import check_capacity
from serve_app.config.check import check_requests, plan_warm_up
from serve_app.config.checkpoint_files import check_files, resolve_family
from serve_app.config.serve_file import parse_app_config
from serve_app.config.served_model import ServedModelConfig, deployed_name
from serve_app.http.openai_requests import MAX_N
from serve_app.ingress import Ingress
from serve_app.validation import Validator

DEPLOYMENTS: Mapping[str, type] = {"encoder": Encoder, "transformer": Transformer, "vae": Vae}
STAGE_OF: Mapping[str, Stage] = {"encoder": "encode", "transformer": "denoise", "vae": "decode"}

CALLS_OF_A_REQUEST = 4 * MAX_N
"""The most simultaneous calls of one stage for a request: to the VAE for a check, input images, output images and
partial images."""
QUEUED_AT_THE_DOOR = 1024
"""Requests that each of Serve's HTTP proxies queues if every ingress is full; further requests get a 429."""


class Refused(RayServeException, ConfigError):  # type: ignore[misc]
    """A config error in the form that Serve prints unchanged. For any other error it prints several tracebacks and
    tries four times."""


def build_app(args: AppConfig | Mapping[str, Any]) -> Application:
    """Builds the application for Serve: `import_path: serve_app.app:build_app` in YAML, with its `args`.

    The annotation is not a class, so that Serve passes the YAML unparsed and this function reports the errors.
    Raises Refused: one line per mistake.
    """
    try:
        return compose_app(args if isinstance(args, AppConfig) else parse_app_config(args))
    except ConfigError as error:
        raise Refused("\n".join(f"ConfigError: {line}" for line in str(error).splitlines())) from None


def compose_app(config: AppConfig) -> Application:
    """Builds the ingress and three deployments per model; stages that models share are built once.

    Raises ConfigError, also if files are incomplete, or if the cluster's CPUs or GPUs are too few or its GPUs too
    small.
    """
    config = resolve_family(config)
    try:
        check_listening(config.access)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_requests(config)
    if is_single_node():
        check_files(config)
    check_capacity(config)
    return build_ingress(config).bind(config.limits, *_bind(config), jobs=config.jobs, **bind_access(config))


ToldModel = tuple[ModelConfig, tuple[Application, ...], tuple[str, ...]]
"""What the ingress gets for each model: its config, its stages, and the names of those stages that may sleep."""


def _bind(config: AppConfig) -> list[ToldModel]:
    """Binds every stage once, even if several models share it."""
    models = {served.name: served.model.with_vae_dtype(served.vae.dtype) for served in config.served}
    warm_ups: dict[str, WarmUp] = {}
    for served in config.served:
        with config.naming(served):
            planned = plan_warm_up(models[served.name], config.limits)
            warm_ups[served.name] = WarmUp(planned, served.encoder.max_sequence_length)
    bound = {}
    for served in config.served:
        for stage in (stage for stage, owner in served.owners.items() if owner == served.name):
            sharing = [of.name for of in config.served if of.owners[stage] == served.name]
            others = [(models[name], warm_ups[name]) for name in sharing if name != served.name]
            deployment = _deployment(served, stage, config, models[served.name])
            arguments = (models[served.name], served.stages[stage], warm_ups[served.name])
            bound[served.name, stage] = deployment.bind(*arguments, *([others] if others else []))
    return [
        (
            models[served.name],
            tuple(bound[owner, stage] for stage, owner in served.owners.items()),
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
        max_queued_requests=CALLS_OF_A_REQUEST * config.limits.max_concurrent_requests,
        num_shards=stage_config.num_ranks,
        hints=ScalingHints(
            ASSUMED_S[STAGE_OF[stage]] / stage_config.num_ranks,
            stage_config.reports_load,
            tuple(each.claim for of in config.served for each in of.stages.values()),
        ),
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
    """Returns further arguments of the ingress: who may send requests, and the counter of key usage, which all
    ingresses share."""
    auth = config.auth
    counter = None if auth is None else build_counter(auth, _ingress_options(config))
    return {"access": config.access, "key_counter": counter}


def build_ingress(config: AppConfig) -> Deployment:
    """Returns the ingress deployment, to be bound to the stages."""
    return serve.deployment(serve.ingress()(Ingress)).options(
        num_replicas=config.ingress.num_replicas,
        # beyond those in progress, there is room for answers with 429 and for status requests
        max_ongoing_requests=2 * config.limits.max_concurrent_requests,
        max_queued_requests=QUEUED_AT_THE_DOOR,
        backpressure_config=BackpressureConfig(status_code=429),
        **HEALTH_CHECKS,
        max_surge_percent=100,  # on a redeploy the old ones serve until new ones, which need no GPU, are ready
        graceful_shutdown_timeout_s=config.limits.request_timeout_s,
        ray_actor_options=_ingress_options(config),
    )


def _ingress_options(config: AppConfig) -> dict[str, Any]:
    resources = HEAD_NODE if config.ingress.on_head else {}
    return {"num_cpus": config.ingress.num_cpus, "resources": resources}


def build_validator(config: AppConfig) -> Validator:
    """Returns the validator that this app's ingress uses for the first model."""
    return Validator(resolve_family(config).served[0].model, config.limits)
