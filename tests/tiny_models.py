"""Tiny checkpoints by name: those of the six families are named as these are, others may be of one too."""

from deployments.config import ModelConfig
from deployments.families import FAMILIES, Family

EXPERTS = "wan22-a14b"
"""Has two denoisers."""


def family_of(name: str) -> Family:
    return FAMILIES["wan" if name.startswith("wan") else name]


def tiny_model(name: str) -> ModelConfig:
    return ModelConfig(name="tiny", checkpoint=f"tiny://{name}", family=family_of(name).name)
