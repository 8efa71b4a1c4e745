"""What is particular to one architecture. Everything else is said once, for all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deployments.families.geometry import Configs, Geometry
from deployments.memory.config import Dtype


@dataclass(frozen=True)
class Defaults:
    """What a request that says nothing gets beside its size: the defaults of the pipeline's `__call__`."""

    num_inference_steps: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None = None
    fps: int = 16


@dataclass(frozen=True)
class Family:
    """One architecture: what its pipeline does not tell without torch."""

    name: str
    pipeline_class: str
    """`_class_name` in a checkpoint's model_index.json."""
    media: Literal["image", "video"]
    geometry: Callable[[Configs], Geometry]
    """As the pipeline computes it from its components' configs. Raises ValueError."""
    published: Configs
    """Of the published model, what `geometry` reads: for whoever cannot read the checkpoint."""
    defaults: Defaults
    guidance: Literal["guidance_scale", "true_cfg_scale"]
    """Which field scales classifier-free guidance (two forward passes); above 1 it is on."""
    needs_negative_prompt: bool
    """Whether guidance is on only when a negative prompt is given."""
    max_sequence_length: int | None
    """Text tokens per prompt, as in the pipeline's `__call__`; None where the tokenizer alone decides."""
    reads_vae_buffers: bool = False
    """Whether the VAE's files hold more than parameters, which the pipeline may read before it decodes."""
    upcasts_vae: bool = False
    """Whether the pipeline decodes in float32 where the VAE is in float16 and its config has `force_upcast`."""

    def vae_dtype(self, dtype: Dtype, vae_config: Mapping[str, Any]) -> Dtype:
        """What the pipeline decodes in where the VAE is loaded in this one."""
        upcasts = self.upcasts_vae and dtype == "float16" and vae_config.get("force_upcast")
        return "float32" if upcasts else dtype

    def is_guided(self, guidance_scale: float | None, true_cfg_scale: float | None, negative: bool) -> bool:
        """Whether the pipeline will run a second, unconditional pass."""
        scale = guidance_scale if self.guidance == "guidance_scale" else true_cfg_scale
        return scale is not None and scale > 1 and (negative or not self.needs_negative_prompt)
