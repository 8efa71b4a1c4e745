"""Config of a step cache: which steps of a request compute predictions, and which reuse earlier ones."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import Config
from deployments.memory.config import Technique

StepCacheKind = Literal["taylor_seer", "easy_cache"]
_OF_KIND: dict[str, StepCacheKind] = {"interval": "taylor_seer", "threshold": "easy_cache"}
"""Settings that only one kind has."""


class StepCacheConfig(Technique):
    """Predictions of some steps are extrapolated from those of earlier steps, without a forward.

    A step that reuses predictions does so for all passes of guidance, and for the ControlNet. Each pass is
    extrapolated from its own predictions, by the polynomial through the last `order + 1` computed ones, over the
    scheduler's timesteps. At order 1 and equal steps this is TaylorSeer's formula
    (https://huggingface.co/papers/2503.06923), applied to the model's output instead of each layer's.
    """

    main_key = "kind"

    kind: StepCacheKind = Field(
        "taylor_seer",
        description="which steps compute. taylor_seer: every interval-th; easy_cache: those before which the "
        "predictions are expected to have changed by threshold (https://huggingface.co/papers/2507.02860)",
    )
    interval: int = Field(2, ge=2, le=100, description="taylor_seer: one step in this many computes")
    threshold: float = Field(
        0.05,
        gt=0,
        le=10,
        description="easy_cache: expected change, relative to the predictions, up to which a step reuses earlier "
        "ones",
    )
    order: int = Field(
        1, ge=0, le=3, description="order of the polynomial that extrapolates; 0: the last prediction unchanged"
    )
    first_steps: int = Field(3, ge=1, le=1000, description="this many first steps always compute")
    last_steps: int = Field(1, ge=0, le=1000, description="this many last steps always compute")

    @model_validator(mode="after")
    def _refuse_what_is_of_another_kind(self) -> Self:
        for name, kind in _OF_KIND.items():
            if name in self.model_fields_set and self.kind != kind:
                raise ValueError(f"{name} is only for kind {kind}, got kind {self.kind}: leave it out")
        return self


Quality = Literal["high", "medium", "low"]


class TiersConfig(Config):
    """Step caches for a request's `quality` below high; at high and auto every step computes."""

    medium: StepCacheConfig | None = Field(None, description="null: the architecture's own, if it has one")
    low: StepCacheConfig | None = Field(None, description="null: the architecture's own, if it has one")

    def step_cache(self, quality: Quality) -> StepCacheConfig | None:
        """Returns a tier's step cache; None for high, and for a tier that is not set."""
        return {"high": None, "medium": self.medium, "low": self.low}[quality]


NO_TIERS = TiersConfig()
