"""Denoiser classes whose forwards ranks can share by diffusers' plans, and the conditions. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

CONTEXT_PARALLEL = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
)
"""Classes with a `_cp_plan` whose results were compared with the whole model's. The plans of LTX-Video and LTX-2
fail, because their masks are of all heads (diffusers 0.42); those of ChronoEdit, Helios and MiniMax-H3 have not
been tried."""

TENSOR_PARALLEL = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
)
"""Classes with a `_tp_plan`, checked in the same way. The plan of Qwen-Image 2.1 has not been tried."""

_HEADS = "num_attention_heads"


def find_parallel_faults(
    class_name: str, settings: Mapping[str, Any], context_parallel: int, tensor_parallel: int
) -> Iterator[str]:
    """Yields a sentence for each reason why ranks cannot share a denoiser's forwards. settings: config.json."""
    asked = {
        "context_parallel": (context_parallel, CONTEXT_PARALLEL),
        "tensor_parallel": (tensor_parallel, TENSOR_PARALLEL),
    }
    for name, (degree, classes) in asked.items():
        if degree == 1:
            continue
        if class_name not in classes:
            yield (
                f"transformer.{name}: it is not known how ranks share a forward of {class_name}, only of "
                f"{', '.join(sorted(classes))}: leave it out, and use shards or replicas"
            )
            continue
        for key, heads in settings.items():
            if key.endswith(_HEADS) and isinstance(heads, int) and heads % degree:
                divisors = [str(n) for n in range(2, heads + 1) if heads % n == 0]
                yield (
                    f"transformer.{name}: {class_name} has {heads} attention heads ({key}), which {degree} ranks "
                    f"cannot share evenly: set it to one of {', '.join(divisors)}"
                )
