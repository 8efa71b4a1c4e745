"""Whether the app that is being built has room on the cluster's GPUs: asked before any weights are read."""

import importlib
import logging

from ray.exceptions import RayError

from cluster.nodes import cluster_gpus, is_connected, may_grow, run_apart
from deployments.plan.plan import StageConfigs
from deployments.plan.room import find_lack
from deployments.plan.sizes import ModelSizes, default_size
from deployments.request import MediaSize
from serve_app.config import AppConfig, ConfigError

log = logging.getLogger("ray.serve")


def check_room(config: AppConfig) -> None:
    """Warns of what may be too little, and costs nothing where no stage asks for a GPU.

    Raises ConfigError where what is lacking is sure and no nodes may come that have it.
    """
    stages = StageConfigs(config.encoder, config.transformer, config.vae)
    if not is_connected() or not any(stage.num_gpus for stage in stages.by_stage().values()):
        return
    gpus = cluster_gpus()
    sizes = None
    if gpus and all(gpu.memory_bytes for gpu in gpus):
        try:
            sizes = run_apart(describe, config, default_size(config.model))
        except RayError as error:  # what cannot be planned may still run
            log.warning("memory was not planned: %s", error)
    lack = find_lack(stages, sizes, gpus)
    for sentence in lack.perhaps:
        log.warning("GPUs: %s", sentence)
    if lack.surely and may_grow():
        log.warning("GPUs: %s; waiting for nodes that have them", "; ".join(lack.surely))
    elif lack.surely:
        raise ConfigError("; ".join(lack.surely))


def describe(config: AppConfig, size: MediaSize) -> ModelSizes:
    """On the meta device, so in a process that may import torch."""
    description = importlib.import_module("deployments.plan.describe").Description(config.model)
    sizes: ModelSizes = description.sizes(config.encoder, config.transformer, config.vae, (size,))
    return sizes
