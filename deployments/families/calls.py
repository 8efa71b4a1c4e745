"""The kinds of call that a pipeline's components allow, and the parameters of each, read from diffusers' source.

The source is parsed, not imported, because importing diffusers imports torch, and the ingress uses this module.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from deployments.families.sources import (
    REQUIRED,
    arguments_of,
    call_parameters,
    diffusers_folder,
    pipeline_files,
    pipelines_folder,
)
from deployments.request import CallKind

_TABLES: Mapping[str, CallKind] = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": "generate",
    "AUTO_TEXT2VIDEO_PIPELINES_MAPPING": "generate",
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": "edit",
    "AUTO_INPAINT_PIPELINES_MAPPING": "inpaint",
    "AUTO_IMAGE2VIDEO_PIPELINES_MAPPING": "image_to_video",
    "AUTO_VIDEO2VIDEO_PIPELINES_MAPPING": "video_to_video",
}
"""Kinds of call by table in `diffusers/pipelines/auto_pipeline.py`. A table maps model names to pipeline classes;
classes of the same name in several tables run with the same components. The order is by what a kind needs of the
denoiser, the least first: one that was trained to inpaint has more channels than the other kinds fill."""
_SUFFIXES: Mapping[CallKind, str] = {"edit": "Img2Img", "inpaint": "Inpaint", "video_to_video": "VideoToVideo"}
"""Suffixes of classes that no table names and that run with the components of the class without the suffix."""
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
"""Pipelines whose `image` may be several input images for one output image; all others take a list as a batch."""
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
"""Packages whose pipelines make sounds, texts or 3-D objects."""
_FRAMES = ("num_frames", "frames", "video_length")
MAX_IMAGES = 10
FPS = 16
"""Frame rate of a video if its pipeline has no parameter for it."""


@dataclass(frozen=True)
class Defaults:
    """Values of fields that a request leaves out, except its size: the defaults of the pipeline's `__call__`."""

    num_inference_steps: int
    guidance_scale: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None = None
    fps: int = FPS
    strength: float | None = None
    """From 0 to 1, how much of the input image is redrawn."""
    control_scale: float | None = None
    """Weight of the ControlNet."""
    guidance_scale_2: float | None = None
    """Guidance scale of the second expert; None: the same as the first's."""


@dataclass(frozen=True)
class Call:
    """One kind of call: the `__call__` of one pipeline class."""

    kind: CallKind
    pipeline_class: str
    parameters: Mapping[str, Any]
    """Defaults by name: the value if it is a literal, else None; REQUIRED if there is no default."""

    @property
    def media(self) -> Literal["image", "video"]:
        return "image" if self.frames is None and not self.takes_video else "video"

    @property
    def frames(self) -> str | None:
        """Name of the parameter for the number of frames; None: it makes images, or as many frames as it gets."""
        return next((name for name in _FRAMES if name in self.parameters), None)

    @property
    def guidance(self) -> Literal["guidance_scale", "true_cfg_scale"]:
        """The field that scales classifier-free guidance (two forward passes), which is on above 1."""
        return "true_cfg_scale" if "true_cfg_scale" in self.parameters else "guidance_scale"

    @property
    def needs_negative_prompt(self) -> bool:
        """Whether guidance is on only when a negative prompt is given."""
        return self.guidance == "true_cfg_scale"

    @property
    def max_sequence_length(self) -> int | None:
        """Text tokens per prompt; None if only the tokenizer limits them."""
        limit: int | None = self._number("max_sequence_length", int)
        return limit

    @property
    def num_frames(self) -> int:
        """Number of frames of a request that does not set it."""
        return (self.frames and self._number(self.frames, int)) or 1

    @property
    def max_images(self) -> int:
        """Most input images for one output."""
        if "image" not in self.parameters or self.kind == "generate":
            return 0
        return MAX_IMAGES if self.pipeline_class in _SEVERAL else 1

    @property
    def takes_guidance_scale_2(self) -> bool:
        """Whether the second expert may have its own guidance scale."""
        return "guidance_scale_2" in self.parameters

    @property
    def takes_video(self) -> bool:
        """Whether it makes a video from one input video."""
        return self.kind == "video_to_video"

    @property
    def control(self) -> str | None:
        """Name of the parameter for the control image, which it requires; None: it takes none."""
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
        """Returns a parameter's default as `kind`; None if it is not a number."""
        value = self.parameters.get(name)
        return kind(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@cache
def find_calls(pipeline_class: str) -> Mapping[CallKind, Call]:
    """Returns the calls that a checkpoint of this class allows, by kind; the kind it was saved for comes first.

    Raises ValueError if the installed diffusers has no such class.
    """
    tables = _tables()
    own = [kind for kind, table in tables.items() if pipeline_class in table.values()]
    if own:
        kinds = list(tables)
        key = next(key for key, name in tables[own[0]].items() if name == pipeline_class)
        classes = {kind: tables[kind][key] for kind in kinds[kinds.index(own[0]) :] if key in tables[kind]}
    else:
        classes = {kind_by_parameters(call_parameters(pipeline_class)): pipeline_class}
    if "generate" in classes:
        stem = pipeline_class.removesuffix("Pipeline")
        by_name = {kind: f"{stem}{suffix}Pipeline" for kind, suffix in _SUFFIXES.items()}
        classes = {kind: name for kind, name in by_name.items() if name in pipeline_files()} | classes
        classes = {kind: classes[kind] for kind in tables if kind in classes}
    return {kind: Call(kind, name, call_parameters(name)) for kind, name in classes.items()}


def known_calls(calls: Mapping[CallKind, Call], names: Iterable[str]) -> Mapping[CallKind, Call]:
    """Returns the first call, and all others whose pipelines take all of these components and settings."""
    own, *others = calls.values()
    known = [call for call in others if set(names) <= arguments_of(call.pipeline_class, "__init__").keys()]
    return {call.kind: call for call in (own, *known)}


def find_pipelines() -> tuple[str, ...]:
    """Returns the installed pipelines that make images or videos from a prompt and are not deprecated."""
    public = (diffusers_folder() / "__init__.py").read_text(encoding="utf-8")
    found = []
    for name, file in sorted(pipeline_files().items()):
        is_other = {"deprecated", *_OTHER_MEDIA} & set(file.parts) or "Onnx" in name
        if is_other or not name.endswith("Pipeline") or f'"{name}"' not in public:
            continue
        with suppress(ValueError):  # a base class without a `__call__`
            if "prompt" in call_parameters(name):
                found.append(name)
    return tuple(found)


def kind_by_parameters(parameters: Mapping[str, Any]) -> CallKind:
    """Returns the kind of call of a pipeline class that no table names."""
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
    """Returns, by kind, the pipeline classes by diffusers' name of the model."""
    found: dict[CallKind, dict[str, str]] = {kind: {} for kind in _TABLES.values()}
    for node in ast.parse((pipelines_folder() / "auto_pipeline.py").read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id in _TABLES:
            found[_TABLES[target.id]] |= dict(_entries(node))
    return found


def _entries(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields the pairs of `OrderedDict([("flux", FluxPipeline), …])`."""
    for pair in ast.walk(node):
        match pair:
            case ast.Tuple(elts=[ast.Constant(value=str(key)), ast.Name(id=name)]):
                yield key, name
