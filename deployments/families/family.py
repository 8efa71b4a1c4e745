"""The facts that are specific to one architecture; all other code is the same for all architectures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.families.calls import Call, find_calls
from deployments.families.geometry import Configs, Geometry
from deployments.memory.config import Dtype
from deployments.options.step_cache import NO_TIERS, TiersConfig
from deployments.request import CallKind


@dataclass(frozen=True)
class Family:
    """One architecture: the facts that cannot be read from its pipeline without torch."""

    name: str
    pipeline_class: str
    """`_class_name` in a checkpoint's model_index.json."""
    geometry: Callable[[Configs], Geometry]
    """Computes sizes from the components' configs, as the pipeline does. Raises ValueError."""
    published: Configs
    """The published model's configs, as far as `geometry` reads them; used if the checkpoint cannot be read."""
    kinds: Sequence[CallKind] | None = None
    """Kinds of call that the pipeline supports; None: all that diffusers has for it."""
    told: Mapping[CallKind, Call] | None = None
    """Calls of a modular pipeline, which its source does not list in one place; None: the source lists them."""
    reads_vae_buffers: bool = False
    """Whether the VAE's files hold more than parameters, which the pipeline may read before it decodes."""
    tiers: TiersConfig = NO_TIERS
    """Step caches for requests of lower quality; only measured ones are set."""
    upcasts_vae: bool = False
    """Whether the pipeline decodes in float32 if the VAE is in float16 and its config has `force_upcast`."""

    def vae_dtype(self, dtype: Dtype, vae_config: Mapping[str, Any]) -> Dtype:
        """Returns the dtype in which the pipeline decodes if the VAE is loaded in `dtype`."""
        upcasts = self.upcasts_vae and dtype == "float16" and vae_config.get("force_upcast")
        return "float32" if upcasts else dtype

    @property
    def calls(self) -> Mapping[CallKind, Call]:
        """Calls that its components allow, by kind; the kind that they were trained for comes first."""
        calls = self.told or find_calls(self.pipeline_class)
        return calls if self.kinds is None else {kind: calls[kind] for kind in self.kinds}

    @property
    def call(self) -> Call:
        """The first of `calls`."""
        return next(iter(self.calls.values()))

    @property
    def media(self) -> Literal["image", "video"]:
        return self.call.media

    @property
    def max_sequence_length(self) -> int | None:
        """Text tokens per prompt; None if only the tokenizer limits them."""
        return self.call.max_sequence_length
