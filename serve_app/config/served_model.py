"""One served model: its checkpoint and its stages, some of which may belong to another model."""

import re
from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from cluster.config import Config
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.stage import StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig


class ServedModelConfig(Config):
    """One served checkpoint: the model and its three stages."""

    model: ModelConfig
    encoder: EncoderConfig = EncoderConfig()
    transformer: TransformerConfig = TransformerConfig()
    vae: VaeConfig = VaeConfig()

    @property
    def name(self) -> str:
        return self.model.name

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.model.takes_adapters:
            if self.transformer.tensor_parallel > 1:
                raise ValueError(
                    "transformer.tensor_parallel: tensor_parallel and adapters do not combine: use "
                    "context_parallel, or shards"
                )
            if self.transformer.trace:
                raise ValueError("transformer.trace: trace and adapters do not combine: use compile: blocks")
        return self

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages by name, in the order in which a request passes them."""
        return {"encoder": self.encoder, "transformer": self.transformer, "vae": self.vae}

    @property
    def owners(self) -> dict[str, str]:
        """For each stage, the name of the model that owns it: this one, or the one that it is shared with."""
        shared = {"encoder": self.encoder.shared_with, "transformer": None, "vae": self.vae.shared_with}
        return {stage: owner or self.name for stage, owner in shared.items()}


def check_shared(models: Sequence[ServedModelConfig]) -> None:
    """Raises ValueError if a stage cannot be shared as configured, whatever the checkpoints contain."""
    said = {served.name: served for served in models}
    for i, served in enumerate(models):
        for stage, owner in served.owners.items():
            if owner == served.name:
                continue
            place = f"models.{i}.{stage}.shared_with"
            more = served.stages[stage].model_fields_set - {"shared_with"}
            if owner not in said:
                raise ValueError(f"{place}: {owner!r} is not one of the models: {', '.join(said)}")
            if said[owner].owners[stage] != owner:
                raise ValueError(
                    f"{place}: {owner!r} does not own its {stage}: name {said[owner].owners[stage]!r}"
                )
            if more:
                raise ValueError(f"{place}: the settings of {owner!r} apply: leave out {', '.join(sorted(more))}")
            if not said[owner].stages[stage].min_replicas:
                raise ValueError(
                    f"{place}: a shared stage cannot sleep: set min_replicas of {owner!r}'s {stage} to 1 or more"
                )


def deployed_name(name: str) -> str:
    """Returns the model's name with all characters replaced that cannot be part of deployment and file names."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)
