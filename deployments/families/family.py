"""What is particular to one architecture. Everything else is said once, for all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.families.calls import Call, find_calls
from deployments.families.geometry import Configs, Geometry
from deployments.memory.config import Dtype
from deployments.request import CallKind
from deployments.step_cache import NO_TIERS, TiersConfig


@dataclass(frozen=True)
class Family:
    """One architecture: what its pipeline does not tell without torch."""

    name: str
    pipeline_class: str
    """`_class_name` in a checkpoint's model_index.json."""
    geometry: Callable[[Configs], Geometry]
    """As the pipeline computes it from its components' configs. Raises ValueError."""
    published: Configs
    """Of the published model, what `geometry` reads: for whoever cannot read the checkpoint."""
    kinds: Sequence[CallKind] | None = None
    """Of call, which its pipeline has told that it can do; None: all that diffusers has for it."""
    told: Mapping[CallKind, Call] | None = None
    """Those of a modular pipeline, whose source does not say them in one place; None: the source does."""
    reads_vae_buffers: bool = False
    """Whether the VAE's files hold more than parameters, which the pipeline may read before it decodes."""
    tiers: TiersConfig = NO_TIERS
    """Step caches for requests of lower quality: measured, or none."""
    upcasts_vae: bool = False
    """Whether the pipeline decodes in float32 where the VAE is in float16 and its config has `force_upcast`."""

    def vae_dtype(self, dtype: Dtype, vae_config: Mapping[str, Any]) -> Dtype:
        """What the pipeline decodes in where the VAE is loaded in this one."""
        upcasts = self.upcasts_vae and dtype == "float16" and vae_config.get("force_upcast")
        return "float32" if upcasts else dtype

    @property
    def calls(self) -> Mapping[CallKind, Call]:
        """What may be asked of its components, by kind; what they were trained for comes first."""
        calls = self.told or find_calls(self.pipeline_class)
        return calls if self.kinds is None else {kind: calls[kind] for kind in self.kinds}

    @property
    def call(self) -> Call:
        """The first of them."""
        return next(iter(self.calls.values()))

    @property
    def media(self) -> Literal["image", "video"]:
        return self.call.media

    @property
    def max_sequence_length(self) -> int | None:
        """Text tokens per prompt; None where the tokenizer alone decides."""
        return self.call.max_sequence_length
