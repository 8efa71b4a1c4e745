"""What may be said of a step cache: which steps of a request compute its predictions, and which reuse them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import Config
from deployments.memory.config import Technique

StepCacheKind = Literal["taylor_seer", "easy_cache"]
_OF_KIND: dict[str, StepCacheKind] = {"interval": "taylor_seer", "threshold": "easy_cache"}
"""Settings that one kind alone has."""


class StepCacheConfig(Technique):
    """Predictions of some steps are extrapolated from those of the steps before, which costs no forward.

    A step that reuses does so for all passes of guidance, and for the ControlNet. Each pass is extrapolated from
    its own predictions, by the polynomial through the last `order + 1` that were computed, over the scheduler's
    timesteps. At order 1 and equal steps that is TaylorSeer's (https://huggingface.co/papers/2503.06923), of what
    the model returns instead of what each of its layers does.
    """

    main_key = "kind"

    kind: StepCacheKind = Field(
        "taylor_seer",
        description="which steps compute: taylor_seer, every interval-th; easy_cache, when the predictions are "
        "expected to have changed by threshold (https://huggingface.co/papers/2507.02860)",
    )
    interval: int = Field(2, ge=2, le=100, description="taylor_seer: of so many steps one computes")
    threshold: float = Field(
        0.05, gt=0, le=10, description="easy_cache: change, relative to the predictions, that is let go by"
    )
    order: int = Field(1, ge=0, le=3, description="of the polynomial; 0: the last prediction as it is")
    first_steps: int = Field(3, ge=1, le=1000, description="steps at the beginning that all compute")
    last_steps: int = Field(1, ge=0, le=1000, description="steps at the end that all compute")

    @model_validator(mode="after")
    def _refuse_what_is_of_another_kind(self) -> Self:
        for name, kind in _OF_KIND.items():
            if name in self.model_fields_set and self.kind != kind:
                raise ValueError(f"{name} is of kind {kind}, got kind {self.kind}: leave it out")
        return self


Quality = Literal["high", "medium", "low"]


class TiersConfig(Config):
    """What a request's `quality` below high stands for; of high, and of auto, every step computes."""

    medium: StepCacheConfig | None = Field(None, description="None: the architecture's own, if it has one")
    low: StepCacheConfig | None = Field(None, description="None: the architecture's own, if it has one")

    def step_cache(self, quality: Quality) -> StepCacheConfig | None:
        """None: of high, and of what is not set."""
        return {"high": None, "medium": self.medium, "low": self.low}[quality]


NO_TIERS = TiersConfig()
