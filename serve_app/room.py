"""Whether the app that is being built has room on the cluster: asked before any weights are read."""

import importlib
import logging

from ray.exceptions import RayError

from cluster.inventory import Gpu
from cluster.nodes import cluster_gpus, cluster_nodes, is_connected, may_grow, run_apart
from deployments.plan.cpu_room import find_cpu_lack
from deployments.plan.plan import StageConfigs
from deployments.plan.room import Lack, find_lack
from deployments.plan.several import ModelNeeds, place_beside
from deployments.plan.sizes import ModelSizes, default_size
from deployments.request import MediaSize
from serve_app.config import AppConfig, ConfigError, ServedModelConfig
from serve_app.files import shared_stages

log = logging.getLogger("ray.serve")


def check_room(config: AppConfig) -> None:
    """Warns of what may be too little. Takes time only where a stage asks for a GPU.

    Raises ConfigError where what is lacking is sure and no nodes may come that have it.
    """
    if not is_connected():
        return
    ingress_cpus = config.ingress.num_replicas * config.ingress.num_cpus
    stages = {
        name if config.is_one else f"{served.name} {name}": stage
        for served in config.served
        for name, stage in served.stages.items()
        if served.holders[name] == served.name
    }
    _judge("CPUs", find_cpu_lack(stages, ingress_cpus, cluster_nodes()))
    if not any(stage.num_gpus for stage in stages.values()):
        return
    gpus = cluster_gpus()
    needs = {served.name: _needs(served, gpus) for served in config.served}
    beside = place_beside(list(needs.values()), gpus)
    for served in config.served:
        of = needs[served.name]
        with config.naming(served):
            _judge("GPUs", find_lack(of.stages, of.sizes, gpus, shared=of.shared, beside=beside[served.name]))


def _needs(served: ServedModelConfig, gpus: tuple[Gpu, ...]) -> ModelNeeds:
    sizes = None
    if gpus and all(gpu.memory_bytes for gpu in gpus):
        try:
            sizes = run_apart(describe, served, default_size(served.model))
        except RayError as error:  # what cannot be planned may still run
            log.warning("memory was not planned: %s", error)
    stages = StageConfigs(served.encoder, served.transformer, served.vae)
    return ModelNeeds(served.name, stages, sizes, shared_stages(served))


def _judge(what: str, lack: Lack) -> None:
    for sentence in lack.perhaps:
        log.warning("%s: %s", what, sentence)
    if lack.surely and may_grow():
        log.warning("%s: %s; waiting for nodes that have them", what, "; ".join(lack.surely))
    elif lack.surely:
        raise ConfigError("\n".join(lack.surely))


def describe(config: ServedModelConfig, size: MediaSize) -> ModelSizes:
    """On the meta device, so in a process that may import torch."""
    description = importlib.import_module("deployments.plan.describe").Description(config.model)
    sizes: ModelSizes = description.sizes(config.encoder, config.transformer, config.vae, (size,))
    return sizes
