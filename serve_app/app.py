"""Config to Serve application."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.exceptions import RayServeException

from cluster.nodes import is_alone
from cluster.serve_options import HEAD_NODE, HEALTH_CHECKS, plan_serve_options
from deployments.config import StageConfig
from deployments.encoder import Encoder
from deployments.stages.preload import plan_preload
from deployments.transformer import Transformer
from deployments.vae import Vae
from deployments.warm_up import WarmUp
from serve_app.config import AppConfig, ConfigError, parse_app_config
from serve_app.config_check import check_defaults, plan_warm_up
from serve_app.files import check_files, resolve_family
from serve_app.ingress import Ingress
from serve_app.room import check_room
from serve_app.validation import Validator


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
    """The four deployments of one served checkpoint.

    Raises ConfigError, also if files are not whole, or the cluster has too few CPUs or GPUs or too small ones.
    """
    config = resolve_family(config)
    model, timeout_s = config.model.with_vae_dtype(config.vae.dtype), config.limits.request_timeout_s
    check_defaults(model, config.limits)
    if is_alone():
        check_files(config)
    check_room(config)
    warm_up = WarmUp(plan_warm_up(model, config.limits), config.encoder.max_sequence_length)

    def stage(deployment: type, stage_config: StageConfig) -> Application:
        options = plan_serve_options(
            stage_config,
            graceful_shutdown_timeout_s=timeout_s,
            num_shards=stage_config.num_ranks,
            reports_load=stage_config.reports_load,
            preload=plan_preload(model, stage_config),
        )
        return serve.deployment(deployment).options(**options).bind(model, stage_config, warm_up)

    return build_ingress(config).bind(
        model,
        config.limits,
        stage(Encoder, config.encoder),
        stage(Transformer, config.transformer),
        stage(Vae, config.vae),
        jobs=config.jobs,
    )


def build_ingress(config: AppConfig) -> Deployment:
    """What is to be bound to the three stages."""
    return serve.deployment(serve.ingress()(Ingress)).options(
        num_replicas=config.ingress.num_replicas,
        # room beyond those in progress: for 429s, and for whoever asks how it goes
        max_ongoing_requests=2 * config.limits.max_concurrent_requests,
        **HEALTH_CHECKS,
        max_surge_percent=100,  # on a redeploy the old ones serve until the new ones can: they need no GPU
        graceful_shutdown_timeout_s=config.limits.request_timeout_s,
        ray_actor_options={
            "num_cpus": config.ingress.num_cpus,
            "resources": HEAD_NODE if config.ingress.on_head else {},
        },
    )


def build_validator(config: AppConfig) -> Validator:
    """What this app's ingress will judge requests by."""
    return Validator(resolve_family(config).model, config.limits)
