"""Merges several forwards into one: which inputs are concatenated, which must be equal, how texts are padded.

Each model class has a rule of a few lines. A class without a rule runs unmerged, which is always correct.
"""

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Inputs = Mapping[str, Any]
"""Keyword arguments of the denoiser's forward: tensors, nested dicts of them, lists and flags."""

TEXT_BUCKET = 128
"""Texts whose lengths round up to the same multiple of this may be merged into one batch, padded and masked."""


@dataclass(frozen=True)
class MergeRule:
    """How to merge the inputs of one model class. Any tensor not named, in lists too, is concatenated along its
    first dimension."""

    equal: frozenset[str] = frozenset()
    """Tensors without a batch dimension, or of which the model reads only the first sample. Forwards are merged
    only if these are equal by value."""
    lists: frozenset[str] = frozenset()
    """Lists with one entry per sample."""
    ragged: Mapping[str, str | None] = field(default_factory=dict)
    """[B, S, D] inputs whose S may differ, and the name of the boolean mask [B, S] that hides padding; None for
    lists of [S, D], which the model pads itself."""
    pads_to: int | None = None
    """Multiple to which the model pads each sample of a list before it concatenates them in one dimension.
    None: it does not concatenate them."""


_IDS = frozenset({"img_ids", "txt_ids"})

RULES: Mapping[str, MergeRule] = {
    "AuraFlowTransformer2DModel": MergeRule(),
    "BriaTransformer2DModel": MergeRule(equal=_IDS),
    "ChromaTransformer2DModel": MergeRule(equal=_IDS),
    "CogView3PlusTransformer2DModel": MergeRule(),
    "CogView4Transformer2DModel": MergeRule(),
    "Flux2Transformer2DModel": MergeRule(equal=_IDS),
    "Flux3Transformer2DModel": MergeRule(equal=_IDS | {"image_cond_ids"}),
    "FluxTransformer2DModel": MergeRule(equal=_IDS),
    "HunyuanVideoTransformer3DModel": MergeRule(),
    "Ideogram4Transformer2DModel": MergeRule(),
    "Krea2Transformer2DModel": MergeRule(equal=frozenset({"position_ids"})),
    "LTXVideoTransformer3DModel": MergeRule(),
    "LongCatImageTransformer2DModel": MergeRule(equal=_IDS),
    "Lumina2Transformer2DModel": MergeRule(),
    "OvisImageTransformer2DModel": MergeRule(equal=_IDS),
    "PixArtTransformer2DModel": MergeRule(),
    "QwenImageTransformer2DModel": MergeRule(
        lists=frozenset({"img_shapes"}), ragged={"encoder_hidden_states": "encoder_hidden_states_mask"}
    ),
    "SD3Transformer2DModel": MergeRule(),
    "SanaTransformer2DModel": MergeRule(),
    "SanaVideoTransformer3DModel": MergeRule(),
    "UNet2DConditionModel": MergeRule(),
    "WanTransformer3DModel": MergeRule(),
    "ZImageTransformer2DModel": MergeRule(
        lists=frozenset({"x", "cap_feats"}), ragged={"cap_feats": None}, pads_to=32
    ),
}


def takes_any_length(class_name: str) -> bool:
    """Returns whether models of this class get texts unpadded."""
    return class_name in RULES and bool(RULES[class_name].ragged)


def num_samples(inputs: Inputs) -> int:
    """Returns the samples in one forward: 2 if a pipeline puts both guidance passes into one batch."""
    return len(latents_of(inputs))


def num_tokens(inputs: Inputs, patch: int | Sequence[int] = 1) -> int:
    """Returns the latent positions of one forward over all samples, after patching; its cost grows with these.

    [B, S, D] -> B * S; [B, C, (F,) H, W], or a list of [C, (F,) H, W] -> B * F * H * W / patch volume.
    """
    latents = latents_of(inputs)
    if not isinstance(latents, torch.Tensor):
        return sum(num_tokens({"sample": sample[None]}, patch) for sample in latents)
    if latents.ndim == 3:
        return int(latents.shape[0] * latents.shape[1])
    space = latents.shape[2:]
    sides = [patch] * 2 if isinstance(patch, int) else list(patch)
    return int(latents.shape[0] * math.prod(space) // math.prod(sides))


def split(output: Any, sizes: Sequence[int]) -> list[Any]:
    """Divides the output of a merged forward into parts of `sizes` samples."""
    if len(sizes) == 1:
        return [output]
    if isinstance(output, torch.Tensor):
        return list(output.split_with_sizes(list(sizes)))
    if isinstance(output, tuple):
        return list(zip(*(split(part, sizes) for part in output), strict=True))
    ends = list(accumulate(sizes))
    return [output[end - size : end] for end, size in zip(ends, sizes, strict=True)]


class Merger:
    """Compares and merges forwards by the rule of one model class."""

    def __init__(self, class_name: str, *, has_adapters: bool = False) -> None:
        """has_adapters: whether LoRA is used, so that all samples must have equally many rows per layer."""
        self._rule, self._has_adapters = RULES.get(class_name), has_adapters
        self._digests: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @property
    def knows_signatures(self) -> bool:
        """Whether forwards can be compared; if not, each forward has a signature of its own."""
        return self._rule is not None

    def signature(self, inputs: Inputs) -> Hashable:
        """Returns the signature: forwards of equal signature may be merged. Without a rule, each has its own."""
        if self._rule is None:
            return object()
        masks = set(self._rule.ragged.values())
        return tuple((k, self._describe(k, v)) for k, v in sorted(inputs.items()) if k not in masks)

    def _describe(self, name: str, value: Any) -> Hashable:
        assert self._rule is not None
        if isinstance(value, torch.Tensor):
            if name in self._rule.equal:
                return self._digest(value)
            if name in self._rule.ragged:
                return math.ceil(value.shape[1] / TEXT_BUCKET), tuple(value.shape[2:]), value.dtype
            return tuple(value.shape[1:]), value.dtype
        if isinstance(value, Mapping):
            return tuple((k, self._describe(k, v)) for k, v in sorted(value.items()))
        if name in self._rule.lists:
            return self._describe_samples(name, value)
        if isinstance(value, list | tuple):
            return tuple(self._describe(name, entry) for entry in value)
        return repr(value)

    def _describe_samples(self, name: str, samples: Sequence[Any]) -> Hashable:
        """Describes a list of similar entries: tensors, or nests of numbers. Nests of tensors never match."""
        if isinstance(samples[0], torch.Tensor):
            longest = self._describe(name, max(samples, key=len)[None])
            if not self._has_adapters or self._rule is None or self._rule.pads_to is None:
                return longest
            return longest, tuple(math.ceil(len(sample) / self._rule.pads_to) for sample in samples)
        has_tensors = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(samples))
        return object() if has_tensors else repr(samples[0])

    def _digest(self, value: torch.Tensor) -> bytes:
        """Hash of shape, dtype and content; cached, because a request passes the same tensor at every step."""
        digest: bytes | None = self._digests.get(value)  # type: ignore[no-untyped-call]
        if digest is None:
            content = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            digest = hashlib.sha256(repr((value.shape, value.dtype)).encode() + content).digest()
            self._digests[value] = digest
        return digest

    def merge(self, batch: Sequence[Inputs]) -> Inputs:
        """Merges the inputs in `batch`, whose signatures are equal, into one; a lone entry stays as it is."""
        if len(batch) == 1:
            return batch[0]
        assert self._rule is not None
        batch = [self._pad(inputs, batch) for inputs in batch]
        sizes = [num_samples(inputs) for inputs in batch]
        return {name: self._join(name, [inputs[name] for inputs in batch], sizes) for name in batch[0]}

    def _pad(self, inputs: Inputs, batch: Sequence[Inputs]) -> Inputs:
        assert self._rule is not None
        padded = dict(inputs)
        for name, mask_name in self._rule.ragged.items():
            if mask_name is None:
                continue
            lengths = [int(other[name].shape[1]) for other in batch]
            if len(set(lengths)) == 1 and len({other.get(mask_name) is None for other in batch}) == 1:
                continue
            value, mask = inputs[name], inputs.get(mask_name)
            if mask is None:
                mask = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
            extra = max(lengths) - value.shape[1]
            padded[name] = torch.nn.functional.pad(value, (0, 0, 0, extra))
            padded[mask_name] = torch.nn.functional.pad(mask.bool(), (0, extra))
        return padded

    def _join(self, name: str, values: Sequence[Any], sizes: Sequence[int]) -> Any:
        assert self._rule is not None
        first = values[0]
        if isinstance(first, torch.Tensor) and name not in self._rule.equal:
            # UNet pipelines pass one timestep for all samples of a forward, without a batch dimension
            return torch.cat([v.expand(n) if v.ndim == 0 else v for v, n in zip(values, sizes, strict=True)])
        if isinstance(first, Mapping):
            return {key: self._join(key, [value[key] for value in values], sizes) for key in first}
        if name in self._rule.lists:
            return [entry for value in values for entry in value]
        if isinstance(first, list | tuple):
            return type(first)(self._join(name, entries, sizes) for entries in zip(*values, strict=True))
        return first


Mergers = Mapping[str, Merger]
"""Mergers of a checkpoint's denoisers by component name: forwards of two denoisers are never merged."""


def build_mergers(models: Mapping[str, nn.Module], *, has_adapters: bool = False) -> Mergers:
    """Returns a merger for each model or skeleton, by component name."""
    return {name: Merger(type(model).__name__, has_adapters=has_adapters) for name, model in models.items()}


def patch_size(model: Any) -> Any:
    """Returns the latent positions per token of a denoiser or its skeleton: one number, or one for each axis."""
    return model.config.get("patch_size", 1)


def latents_of(inputs: Inputs) -> Any:
    """Returns what is denoised, [B, ...] or a list of samples.

    UNets call this input `sample`, Z-Image calls it `x`, and all other models `hidden_states`.
    """
    return inputs[next(name for name in ("sample", "x", "hidden_states") if name in inputs)]
