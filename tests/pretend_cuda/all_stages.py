"""A pytest plugin that gives a GPU to every stage whose config does not set num_gpus.

It must be loaded before any config is built.
"""

from cluster.replicas.resources import ResourceConfig

ResourceConfig.model_fields["num_gpus"].default = 1.0
ResourceConfig.model_rebuild(force=True)
