"""Tiny checkpoints by name: the six families' have the family's name; others may belong to one too."""

from deployments.config.model import ModelConfig
from deployments.families import FAMILIES, Family

EXPERTS = "wan22-a14b"
"""A model with two denoisers."""


def family_of(name: str) -> Family:
    return FAMILIES["wan" if name.startswith("wan") else name]


def tiny_model(name: str) -> ModelConfig:
    return ModelConfig(name="tiny", checkpoint=f"tiny://{name}", family=family_of(name).name)
