"""The blocks of a denoiser: their names in forward order, and their bytes."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn

from deployments.memory.gguf import find_gguf
from deployments.memory.stored import stored_bytes

TAIL = (
    "norm_out",
    "proj_out",
    "conv_norm_out",
    "conv_out",
    "final_layer",
    "audio_norm_out",
    "audio_proj_out",
)
"""diffusers' names of the modules that run after the last block; only the last shard has these modules."""

BLOCK_LISTS: Mapping[str, tuple[str, ...]] = {
    "BriaTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "Flux3Transformer2DModel": ("single_transformer_blocks",),
    "HiDreamImageTransformer2DModel": ("double_stream_blocks", "single_stream_blocks"),
    "Kandinsky5Transformer3DModel": ("visual_transformer_blocks",),
    "Kandinsky6Transformer3DModel": ("visual_transformer_blocks",),
    "Lumina2Transformer2DModel": ("layers",),
    "LuminaNextDiT2DModel": ("layers",),
    "PRXTransformer2DModel": ("blocks",),
    "ZImageTransformer2DModel": ("layers",),
}
"""The chain of a class: the lists whose blocks each feed the next, in forward order. Only classes that declare no
lists, or other lists besides, need an entry. Those other lists run before the chain, in every shard's head unless
`FIRST_SHARD_BLOCKS` names them."""

FIRST_SHARD_BLOCKS: Mapping[str, tuple[str, ...]] = {
    "Flux3Transformer2DModel": ("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond"),
    "Lumina2Transformer2DModel": ("context_refiner", "noise_refiner"),
    "ZImageTransformer2DModel": ("context_refiner", "noise_refiner"),
}
"""The lists before the chain whose results only its first block reads, so that only the first shard has them."""

UNCUTTABLE: Mapping[str, str] = {
    "HunyuanDiT2DModel": "the second half of its blocks reads the outputs of the first half",
    "LatteTransformer3DModel": "its blocks over space and over time take turns, in two lists",
    "WanVACETransformer3DModel": "its vace_blocks run beside its blocks",
}
"""Classes that run as one shard whatever they declare, with the reason."""

_UNET_ORDER = ("down_blocks", "mid_block", "up_blocks")
_SECOND_HALF = "single_transformer_blocks"


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of a model's weights, by which shards hold them."""

    head: int
    """Held by every shard: the embedders, and whatever else is neither block nor tail."""
    blocks: tuple[int, ...]
    """Each held by one shard, in forward order. The first includes what only the first shard has
    (`FIRST_SHARD_BLOCKS`)."""
    tail: int
    """Held by the last shard: output norm and projection."""

    def of_shard(self, start: int, end: int) -> int:
        """Returns the bytes of the shard that has blocks `start:end`."""
        return self.head + sum(self.blocks[start:end]) + (self.tail if end == len(self.blocks) else 0)


def build_skeleton(model_class: type[ModelMixin], checkpoint_dir: Path, subfolder: str) -> nn.Module:
    """Builds the model of this checkpoint on the meta device: all of its structure, none of its weights.

    Not thread-safe: accelerate patches `nn.Module` meanwhile.

    Raises:
        ValueError: its config.json does not describe a model of this class.
    """
    config = model_class.load_config(checkpoint_dir, subfolder=subfolder, local_files_only=True)
    try:
        with init_empty_weights():
            skeleton: Any = model_class.from_config(config)
    except Exception as error:  # constructors may raise anything
        described = f"{checkpoint_dir / subfolder / 'config.json'} does not describe {model_class.__name__}"
        raise ValueError(f"{described}: {type(error).__name__}: {error}") from error
    skeleton.gguf_file = find_gguf(checkpoint_dir / subfolder)
    built: nn.Module = skeleton
    return built


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the blocks that may go to different shards, in forward order.

    A transformer's blocks are the lists in `BLOCK_LISTS`, or else those whose elements' classes diffusers declares
    as repeated or as not to be split; a UNet's are its down, mid and up blocks.

    Raises:
        ValueError: there are no blocks, or there are several lists that are not known to feed each other.
    """
    children = dict(model.named_children())
    lists = [name for name in _UNET_ORDER if name in children] if _is_unet(model) else _lists(model)
    if not lists:
        raise ValueError(
            f"{type(model).__name__} declares no blocks that could go to different shards (no list of its "
            "_repeated_blocks or _no_split_modules); run it as one shard"
        )
    return tuple(name for part in lists for name in _members(part, children[part]))


def cuttable_names(model: nn.Module) -> tuple[str, ...]:
    """Returns `block_names`, or () if no blocks can go to different shards."""
    try:
        return block_names(model)
    except ValueError:
        return ()


def block_bytes(model: nn.Module) -> BlockBytes:
    """Returns the bytes of each block of a model, or of a skeleton from `as_stored`."""
    first, *others = (stored_bytes(model.get_submodule(name)) for name in block_names(model))
    front = sum(stored_bytes(model.get_submodule(name)) for name in front_names(model))
    blocks = (front + first, *others)
    tail = sum(stored_bytes(model.get_submodule(name)) for name in tail_names(model))
    return BlockBytes(stored_bytes(model) - sum(blocks) - tail, blocks, tail)


def front_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the blocks that only the first shard needs; in others, stubs return their inputs."""
    lists = FIRST_SHARD_BLOCKS.get(type(model).__name__, ())
    return tuple(name for part in lists for name in _members(part, model.get_submodule(part)))


def tail_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the modules that only the last shard needs."""
    return tuple(name for name, _ in model.named_children() if name in TAIL)


def shape_only_inputs(model: nn.Module) -> frozenset[str]:
    """Returns the names of inputs of which shards after the first read shape and dtype only, so zeros suffice.

    A transformer embeds its latents and then replaces the result by what crossed the cut. A UNet does not:
    the output of its `conv_in` is the outermost skip, so every shard needs the latents themselves.
    """
    if _is_unet(model):
        return frozenset()
    return frozenset({"hidden_states"} & inspect.signature(type(model).forward).parameters.keys())


def _is_unet(model: nn.Module) -> bool:
    return {"down_blocks", "up_blocks"} <= {name for name, _ in model.named_children()}


def _lists(model: Any) -> Sequence[str]:
    class_name = type(model).__name__
    if class_name in UNCUTTABLE:
        raise ValueError(f"{class_name} cannot be cut into shards: {UNCUTTABLE[class_name]}; run it as one shard")
    if class_name in BLOCK_LISTS:
        return BLOCK_LISTS[class_name]
    kinds = {*(model._repeated_blocks or ()), *(model._no_split_modules or ())}
    lists = [
        name
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and {type(block).__name__ for block in child} <= kinds
    ]
    # Two lists are a chain only by diffusers' convention of double and single blocks. Others (refiners, text
    # blocks, VACE hints) run side by side, and a cut through them would lose the output of the other list.
    if len(lists) > 1 and not (len(lists) == 2 and lists[1] == _SECOND_HALF):
        raise ValueError(
            f"{class_name} has several lists of blocks ({', '.join(lists)}) that are no single "
            "chain, so it cannot be cut into shards; run it as one shard"
        )
    return lists


def _members(name: str, module: nn.Module) -> Sequence[str]:
    return [f"{name}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
