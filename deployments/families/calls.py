"""The kinds of call that a pipeline's components allow, and what each takes: read from diffusers' own source.

Not by importing it, for that imports torch, and the ingress asks.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from deployments.request import CallKind

REQUIRED = ...
"""In place of a default, of a parameter that has none."""
_TABLES: Mapping[str, CallKind] = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": "generate",
    "AUTO_TEXT2VIDEO_PIPELINES_MAPPING": "generate",
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": "edit",
    "AUTO_INPAINT_PIPELINES_MAPPING": "inpaint",
    "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING": "image_to_video",
    "AUTO_VIDEO2VIDEO_PIPELINES_MAPPING": "video_to_video",
}
"""Of `diffusers/pipelines/auto_pipeline.py`: which pipelines run over the same components, by kind. In this order
from what asks least of a denoiser: one that was trained to inpaint has more channels than the others fill."""
_SUFFIXES: Mapping[CallKind, str] = {"edit": "Img2Img", "inpaint": "Inpaint", "video_to_video": "VideoToVideo"}
"""Of classes that no table names, and that run over the components of the class without it."""
_SEVERAL = frozenset(
    {
        "Flux2KleinBaseModularPipeline",
        "Flux2KleinModularPipeline",
        "Flux2KleinPipeline",
        "Flux2ModularPipeline",
        "Flux2Pipeline",
        "Flux3DistilledModularPipeline",
        "Flux3ModularPipeline",
        "QwenImageEditPlusModularPipeline",
        "QwenImageEditPlusPipeline",
    }
)
"""Whose `image` may be several that make one picture; to all others a list is a batch."""
_OTHER_MEDIA = (
    "ace_step",
    "audioldm2",
    "diffusion_gemma",
    "llada2",
    "longcat_audio_dit",
    "shap_e",
    "stable_audio",
    "stable_audio_3",
)
"""Packages whose pipelines make sounds, texts or bodies."""
_FRAMES = ("num_frames", "frames", "video_length")
_CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)
MAX_IMAGES = 10
FPS = 16
"""Of a video whose pipeline does not ask for it."""


@dataclass(frozen=True)
class Defaults:
    """What a request that says nothing gets beside its size: the defaults of the pipeline's `__call__`."""

    num_inference_steps: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None = None
    fps: int = FPS
    strength: float | None = None
    """From 0 to 1, how much of the picture that goes in is drawn anew."""
    control_scale: float | None = None
    """How loud a ControlNet is."""
    guidance_scale_2: float | None = None
    """Of the second expert; None: as of the first."""


@dataclass(frozen=True)
class Call:
    """One kind of call: the `__call__` of one pipeline class."""

    kind: CallKind
    pipeline_class: str
    parameters: Mapping[str, Any]
    """Name to default, where that is a plain value; REQUIRED where there is none."""

    @property
    def media(self) -> Literal["image", "video"]:
        return "image" if self.frames is None and not self.takes_video else "video"

    @property
    def frames(self) -> str | None:
        """What it calls the number of frames; None: it makes pictures, or as many as go in."""
        return next((name for name in _FRAMES if name in self.parameters), None)

    @property
    def guidance(self) -> Literal["guidance_scale", "true_cfg_scale"]:
        """Which field scales classifier-free guidance (two forward passes); above 1 it is on."""
        return "true_cfg_scale" if "true_cfg_scale" in self.parameters else "guidance_scale"

    @property
    def needs_negative_prompt(self) -> bool:
        """Whether guidance is on only when a negative prompt is given."""
        return self.guidance == "true_cfg_scale"

    @property
    def max_sequence_length(self) -> int | None:
        """Text tokens per prompt; None where the tokenizer alone decides."""
        limit: int | None = self._number("max_sequence_length", int)
        return limit

    @property
    def num_frames(self) -> int:
        """Of a request that does not say."""
        return (self.frames and self._number(self.frames, int)) or 1

    @property
    def max_images(self) -> int:
        """Pictures that go into one that comes out."""
        if "image" not in self.parameters or self.kind == "generate":
            return 0
        return MAX_IMAGES if self.pipeline_class in _SEVERAL else 1

    @property
    def takes_guidance_scale_2(self) -> bool:
        """Whether its second expert may have a scale of its own."""
        return "guidance_scale_2" in self.parameters

    @property
    def takes_video(self) -> bool:
        """Of which, one, it makes another."""
        return self.kind == "video_to_video"

    @property
    def control(self) -> str | None:
        """What it calls the control picture, which it needs; None: it takes none."""
        if "control_image" in self.parameters:
            return "control_image"
        return "image" if self.kind == "generate" and "controlnet_conditioning_scale" in self.parameters else None

    @property
    def defaults(self) -> Defaults:
        return Defaults(
            num_inference_steps=self._number("num_inference_steps", int) or 50,
            guidance_scale=self._number("guidance_scale", float),
            true_cfg_scale=self._number("true_cfg_scale", float),
            fps=self._number("frame_rate", int) or FPS,
            strength=self._number("strength", float),
            control_scale=self._number("controlnet_conditioning_scale", float),
            guidance_scale_2=self._number("guidance_scale_2", float),
        )

    def is_guided(self, guidance_scale: float | None, true_cfg_scale: float | None, negative: bool) -> bool:
        """Whether the pipeline will run a second, unconditional pass."""
        scale = guidance_scale if self.guidance == "guidance_scale" else true_cfg_scale
        return scale is not None and scale > 1 and (negative or not self.needs_negative_prompt)

    def _number(self, name: str, kind: type) -> Any:
        """The default; None where it is of another kind."""
        value = self.parameters.get(name)
        return kind(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@cache
def find_calls(pipeline_class: str) -> Mapping[CallKind, Call]:
    """Of the components of a checkpoint of this class; what it was saved for comes first.

    Raises ValueError if the installed diffusers has no such class.
    """
    tables = _tables()
    own = [kind for kind, table in tables.items() if pipeline_class in table.values()]
    if own:
        kinds = list(tables)
        key = next(key for key, name in tables[own[0]].items() if name == pipeline_class)
        classes = {kind: tables[kind][key] for kind in kinds[kinds.index(own[0]) :] if key in tables[kind]}
    else:
        classes = {kind_by_parameters(_parameters(pipeline_class)): pipeline_class}
    if "generate" in classes:
        stem = pipeline_class.removesuffix("Pipeline")
        by_name = {kind: f"{stem}{suffix}Pipeline" for kind, suffix in _SUFFIXES.items()}
        classes = {kind: name for kind, name in by_name.items() if name in _files()} | classes
        classes = {kind: classes[kind] for kind in tables if kind in classes}
    return {kind: Call(kind, name, _parameters(name)) for kind, name in classes.items()}


def known_calls(calls: Mapping[CallKind, Call], names: Iterable[str]) -> Mapping[CallKind, Call]:
    """The first, and those others whose pipelines are made with all of these components and settings."""
    own, *others = calls.values()
    known = [call for call in others if set(names) <= _arguments(call.pipeline_class, "__init__").keys()]
    return {call.kind: call for call in (own, *known)}


def find_pipelines() -> tuple[str, ...]:
    """Of the installed diffusers, those that draw pictures or videos from a prompt, and are not deprecated."""
    public = (diffusers_folder() / "__init__.py").read_text(encoding="utf-8")
    found = []
    for name, file in sorted(_files().items()):
        is_other = {"deprecated", *_OTHER_MEDIA} & set(file.parts) or "Onnx" in name
        if is_other or not name.endswith("Pipeline") or f'"{name}"' not in public:
            continue
        with suppress(ValueError):  # a base of others
            if "prompt" in _parameters(name):
                found.append(name)
    return tuple(found)


def kind_by_parameters(parameters: Mapping[str, Any]) -> CallKind:
    """Of a class that no table names."""
    has_frames = any(name in parameters for name in _FRAMES)
    if "video" in parameters and (parameters["video"] is REQUIRED or not has_frames):
        return "video_to_video"
    if "mask_image" in parameters:
        return "inpaint"
    if "image" not in parameters:
        return "generate"
    return "image_to_video" if has_frames else "edit"


@cache
def _tables() -> Mapping[CallKind, Mapping[str, str]]:
    """By kind: diffusers' name of a family, and its pipeline class."""
    found: dict[CallKind, dict[str, str]] = {kind: {} for kind in _TABLES.values()}
    for node in ast.parse((_pipelines() / "auto_pipeline.py").read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id in _TABLES:
            found[_TABLES[target.id]] |= dict(_entries(node))
    return found


def _entries(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Of `OrderedDict([("flux", FluxPipeline), …])`."""
    for pair in ast.walk(node):
        match pair:
            case ast.Tuple(elts=[ast.Constant(value=str(key)), ast.Name(id=name)]):
                yield key, name


def _parameters(pipeline_class: str) -> Mapping[str, Any]:
    """Of its `__call__`. Raises ValueError."""
    return _arguments(pipeline_class, "__call__")


@cache
def _arguments(pipeline_class: str, of: str) -> Mapping[str, Any]:
    """Of a method, which may be inherited. Raises ValueError."""
    definition = _definition(pipeline_class)
    for method in definition.body:
        if isinstance(method, ast.FunctionDef) and method.name == of:
            return dict(_defaults(method.args))
    for base in definition.bases:
        if isinstance(base, ast.Name) and base.id != "DiffusionPipeline" and base.id.endswith("Pipeline"):
            return _arguments(base.id, of)
    raise ValueError(f"{pipeline_class} of diffusers has no {of} of its own")


def _defaults(arguments: ast.arguments) -> Iterator[tuple[str, Any]]:
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][1:]
    num_required = len(names) - len(arguments.defaults)
    values: list[ast.expr | None] = [*[None] * num_required, *arguments.defaults]
    names += [argument.arg for argument in arguments.kwonlyargs]
    values += arguments.kw_defaults
    for name, value in zip(names, values, strict=True):
        yield name, REQUIRED if value is None else _literal(value)


def _literal(value: ast.expr) -> Any:
    """None of what is computed."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


def _definition(pipeline_class: str) -> ast.ClassDef:
    file = _files().get(pipeline_class)
    if file is None:
        raise ValueError("the installed diffusers has none of that name")
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    return next(node for node in nodes if isinstance(node, ast.ClassDef) and node.name == pipeline_class)


@cache
def _files() -> Mapping[str, Path]:
    """By class."""
    files = sorted(_pipelines().glob("**/pipeline*.py"))
    return {name: file for file in files for name in _CLASS.findall(file.read_text(encoding="utf-8"))}


def _pipelines() -> Path:
    return diffusers_folder() / "pipelines"


def diffusers_folder() -> Path:
    """Of its sources."""
    spec = find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
