"""Models as published, from their configs in tests/data/published."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deployments.config.model import ModelConfig
from deployments.plan.describe import Description
from deployments.plan.plan import SizesOf, StageConfigs
from deployments.plan.sizes import ModelSizes
from deployments.request import MediaSize

FOLDER = Path(__file__).parents[2] / "data" / "published"


@dataclass(frozen=True)
class Published:
    """A model and the size that it is usually used with."""

    folder: str
    family: str
    size: MediaSize


MODELS = {
    "flux": Published("flux_dev", "flux", MediaSize(1024, 1024)),
    "qwen-image": Published("qwen_image", "qwen-image", MediaSize(1024, 1024)),
    "wan": Published("wan_2_1_14b", "wan", MediaSize(832, 480, 81)),
}


@cache
def description(name: str) -> Description:
    return Description(model_config(name))


def model_config(name: str) -> ModelConfig:
    return ModelConfig(name=name, checkpoint=str(FOLDER / MODELS[name].folder), family=MODELS[name].family)


def sizes_of(name: str) -> SizesOf:
    def sizes(stages: StageConfigs) -> ModelSizes:
        return description(name).sizes(stages.encoder, stages.transformer, stages.vae, (MODELS[name].size,))

    return sizes
