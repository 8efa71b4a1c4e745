"""Checks, before any weights are read, whether the cluster has enough CPUs and GPUs for the app."""

import importlib
import logging

from ray.exceptions import RayError

from cluster.machines.inventory import Gpu
from cluster.machines.nodes import cluster_gpus, cluster_nodes, has_autoscaler, is_connected, run_in_ray_task
from deployments.plan.capacity import Shortage, find_shortage
from deployments.plan.cpu_capacity import find_cpu_shortage
from deployments.plan.plan import StageConfigs
from deployments.plan.several import ModelDemands, place_beside
from deployments.plan.sizes import ModelSizes, default_size
from deployments.request import MediaSize
from serve_app.config.app import AppConfig, ConfigError
from serve_app.config.checkpoint_files import shared_stages
from serve_app.config.served_model import ServedModelConfig

log = logging.getLogger("ray.serve")


def check_capacity(config: AppConfig) -> None:
    """Logs a warning for a possible shortage. Takes time only if a stage needs a GPU.

    Raises ConfigError if a shortage is certain and no nodes can be added to remove it.
    """
    if not is_connected():
        return
    ingress_cpus = config.ingress.num_replicas * config.ingress.num_cpus
    stages = {
        name if config.is_one else f"{served.name} {name}": stage
        for served in config.served
        for name, stage in served.stages.items()
        if served.owners[name] == served.name
    }
    _judge("CPUs", find_cpu_shortage(stages, ingress_cpus, cluster_nodes()))
    if not any(stage.num_gpus for stage in stages.values()):
        return
    gpus = cluster_gpus()
    demands = {served.name: _demands(served, gpus) for served in config.served}
    beside = place_beside(list(demands.values()), gpus)
    for served in config.served:
        of = demands[served.name]
        with config.naming(served):
            _judge("GPUs", find_shortage(of.stages, of.sizes, gpus, shared=of.shared, beside=beside[served.name]))


def _demands(served: ServedModelConfig, gpus: tuple[Gpu, ...]) -> ModelDemands:
    sizes = None
    if gpus and all(gpu.memory_bytes for gpu in gpus):
        try:
            sizes = run_in_ray_task(describe, served, default_size(served.model))
        except RayError as error:  # a model that cannot be planned may still run
            log.warning("memory was not planned: %s", error)
    stages = StageConfigs(served.encoder, served.transformer, served.vae)
    return ModelDemands(served.name, stages, sizes, shared_stages(served))


def _judge(what: str, shortage: Shortage) -> None:
    for sentence in shortage.perhaps:
        log.warning("%s: %s", what, sentence)
    if shortage.surely and has_autoscaler():
        log.warning("%s: %s; waiting for nodes that have them", what, "; ".join(shortage.surely))
    elif shortage.surely:
        raise ConfigError("\n".join(shortage.surely))


def describe(config: ServedModelConfig, size: MediaSize) -> ModelSizes:
    """Returns the model's sizes. Builds it on the meta device, so it needs a process that may import torch."""
    description = importlib.import_module("deployments.plan.describe").Description(config.model)
    sizes: ModelSizes = description.sizes(config.encoder, config.transformer, config.vae, (size,))
    return sizes
