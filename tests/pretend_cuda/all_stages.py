"""A pytest plugin: every stage that says nothing of GPUs has one. Loaded before any config is built."""

from cluster.resources import ResourceConfig

ResourceConfig.model_fields["num_gpus"].default = 1.0
ResourceConfig.model_rebuild(force=True)
