"""Modular pipelines, which diffusers has as blocks: how to build and call them, and which blocks encode texts.

A block reads values of the call and writes others. So a block that uses a text encoder corresponds to the
`encode_prompt` of other pipelines: its inputs are the arguments, and its outputs are the result.
"""

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline import BlockState, PipelineState

from deployments.checkpoints.components import ModelIndex, component_names, weightless
from deployments.checkpoints.modular import BLOCKS, locations
from deployments.families import Call
from deployments.families.calls import kind_by_parameters
from deployments.families.sources import REQUIRED
from deployments.request import CallKind

Replace = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""(name, function that runs a text encoder) -> function to call in its place."""

GUIDERS: Mapping[str, str] = {"guidance_scale": "guider", "guidance_scale_2": "guider_2"}
"""Guider component by the request field of its scale; the second guides the low-noise expert (Wan 2.2)."""
_TRIED_WITH = frozenset({"prompt", "image", "mask_image"})
"""Request fields by which blocks pick a workflow."""

# Blocks raise the errors that they log here, and the handlers of those explain them better.
logging.getLogger("diffusers.modular_pipelines.modular_pipeline").disabled = True


def build_modular(folder: Path, index: ModelIndex, given: Mapping[str, Any]) -> ModularPipeline:
    """Builds the checkpoint's pipeline. given: components by name; all others of the checkpoint are loaded."""
    pipeline_class: Any = getattr(diffusers, index["_class_name"])
    pipe: ModularPipeline = pipeline_class(
        blocks=build_blocks(index), pretrained_model_name_or_path=str(folder), config_dict=dict(index)
    )
    known = pipe.pretrained_component_names
    others = component_names(index).intersection(known) - given.keys()
    loaded = {name: pipe.get_component_spec(name).load(local_files_only=True) for name in sorted(others)}
    # update_components would write each of them into the pipeline's config.
    vars(pipe).update(loaded | {name: part for name, part in given.items() if name in known})
    return pipe


def build_blocks(index: ModelIndex) -> ModularPipelineBlocks:
    """Builds the checkpoint's blocks, except those that rewrite the prompt, which is encoded as it is given.

    Raises ValueError if the installed diffusers does not have the blocks.
    """
    named = getattr(diffusers, index[BLOCKS], None)
    if not getattr(named, "block_classes", None):
        named = getattr(diffusers, getattr(diffusers, index["_class_name"]).default_blocks_name or "", None)
    if named is None:
        raise ValueError(f"its blocks, {index[BLOCKS]}, are not in diffusers {diffusers.__version__}")
    blocks: ModularPipelineBlocks = named()
    for name, block in list(blocks.sub_blocks.items()):
        made = block.intermediate_output_names
        if "prompt" in made and not any(other.endswith("embeds") for other in made):
            del blocks.sub_blocks[name]
    _hide_progress(blocks)
    return blocks


def _hide_progress(block: Any) -> None:
    """Hides the progress bars of all loops; diffusers' own setting reaches only the topmost blocks."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for part in block.sub_blocks.values():
        _hide_progress(part)


def find_modular_calls(folder: Path, index: ModelIndex) -> dict[CallKind, Call]:
    """Returns calls by kind, for workflows that start with a prompt and images and whose components are present.

    Raises ValueError if there are none.
    """
    others = component_names(index) - weightless(index)
    pipe = build_modular(folder, index, dict.fromkeys(others))
    workflows = _workflows(pipe.blocks)
    lacking = [_lacking(blocks, index) for blocks in workflows]
    calls: dict[CallKind, Call] = {}
    for blocks in (blocks for blocks, missing in zip(workflows, lacking, strict=True) if not missing):
        parameters = {each.name: _default(each) for each in blocks.inputs if each.name is not None}
        parameters = {field: guider.guidance_scale for field, guider in _guiders(pipe)} | parameters
        kind = kind_by_parameters(parameters)
        calls.setdefault(kind, Call(kind, index["_class_name"], parameters))
    if not lacking:
        raise ValueError("it does not draw from a prompt and images alone")
    if not calls:
        name = min(lacking[0])
        place = locations(folder).get(name)
        where = f"is in {place}" if place else "is nowhere else either"
        raise ValueError(
            f"its {name} is not here: according to modular_model_index.json it {where}. Fetch it into the "
            f"checkpoint's folder, as {name}"
        )
    return calls


def _lacking(blocks: ModularPipelineBlocks, index: ModelIndex) -> set[str]:
    """Returns the components that these blocks need and the checkpoint does not have."""
    needed = {each.name for each in blocks.expected_components if each.default_creation_method != "from_config"}
    return needed - component_names(index)


def call_names(pipe: Any) -> frozenset[str]:
    """Returns the argument names of a pipeline's call. pipe: the pipeline, or its class if it is not modular."""
    if isinstance(pipe, ModularPipeline):
        return frozenset(pipe._blocks.input_names)
    return _signature_names(pipe if isinstance(pipe, type) else type(pipe))


@cache
def _signature_names(pipeline_class: Any) -> frozenset[str]:
    return frozenset(signature(pipeline_class.__call__).parameters)


def set_guidance(pipe: Any, *scales: float | None) -> None:
    """Sets the guiders' scales in place, because blocks take no scale as an argument. None: unchanged."""
    asked = dict(zip(GUIDERS, scales, strict=True))
    for field, guider in _guiders(pipe):
        if asked[field] is not None:
            guider.guidance_scale = asked[field]


def _guiders(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Yields the guiders that have a scale, each with the request field of the scale."""
    for field, name in GUIDERS.items():
        if hasattr(guider := getattr(pipe, name, None), "guidance_scale"):
            yield field, guider


def _workflows(blocks: Any) -> list[Any]:
    """Returns the workflows of blocks that choose by the call's arguments, each as blocks; the smallest first."""
    if blocks._workflow_map is None:
        return [blocks]
    return [
        blocks.get_workflow(name)
        for name, asked in blocks._workflow_map.items()
        if isinstance(asked, Mapping) and _TRIED_WITH.issuperset(asked)
    ]


def _default(parameter: Any) -> Any:
    """Returns a parameter's default: REQUIRED if it must be given, None if the default is no plain value."""
    if parameter.required and parameter.default is None:
        return REQUIRED
    is_plain = isinstance(parameter.default, str | int | float | bool)
    return parameter.default if is_plain else None


def encoding_blocks(block: Any, encoders: frozenset[str], name: str = "") -> Iterator[str]:
    """Yields the names, as paths, of the blocks in this one that use one of these components and no VAE."""
    if block.sub_blocks:
        for part, sub_block in block.sub_blocks.items():
            yield from encoding_blocks(sub_block, encoders, f"{name}.{part}".lstrip("."))
    elif (reached := {component.name for component in block.expected_components}) & encoders:
        yield from () if "vae" in reached else (name,)


def replace_blocks(pipe: Any, names: Collection[str], replace: Replace) -> None:
    """Replaces the named blocks of a pipeline in place, so pass a copy of the pipeline."""
    vars(pipe)["_blocks"] = _replaced(pipe._blocks, "", names, replace)


def _replaced(block: Any, name: str, names: Collection[str], replace: Replace) -> Any:
    if name in names:
        return EncodingBlock(block, name, replace)
    if not any(other.startswith(f"{name}.".lstrip(".")) for other in names):
        return block
    changed = copy.copy(block)
    changed.sub_blocks = type(block.sub_blocks)(
        (part, _replaced(sub_block, f"{name}.{part}".lstrip("."), names, replace))
        for part, sub_block in block.sub_blocks.items()
    )
    return changed


class EncodingBlock:
    """Replaces a block that runs a text encoder."""

    def __init__(self, block: Any, name: str, replace: Replace) -> None:
        self._block, self._name, self._replace = block, name, replace

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._block)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._block, name)

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        def encode(**_: Any) -> dict[str, Any]:
            inner = copy.copy(state)
            inner.values, inner.kwargs_mapping = dict(state.values), copy.deepcopy(state.kwargs_mapping)
            self._block(components, inner)
            changed = [name for name in self._block.input_names if inner.get(name) is not state.get(name)]
            return {name: inner.get(name) for name in (*self._block.intermediate_output_names, *changed)}

        made = self._replace(self._name, encode)(**self._asked(components, state))
        self._block.set_block_state(state, BlockState(**made))
        return components, state

    def _asked(self, components: Any, state: PipelineState) -> dict[str, Any]:
        """Returns what the block's outputs depend on: its inputs, and whether its pipeline is guided."""
        guided = getattr(components, "requires_unconditional_embeds", None)
        inputs: dict[str, Any] = self._block.get_block_state(state).as_dict()
        return inputs | {"requires_unconditional_embeds": guided}
