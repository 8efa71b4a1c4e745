"""Generates docs/families.md: which diffusers pipelines run staged, sharded or merged, and why others do not.

Imports torch, because the models themselves show where they can be cut.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import diffusers

from deployments.checkpoints.components import ModelIndex, denoiser_names, needed_names, read_index
from deployments.checkpoints.modular import BLOCKS, is_modular
from deployments.checkpoints.source import fetch_checkpoint
from deployments.checkpoints.tiny.names import TINY_MODULES
from deployments.engine.blocks import build_skeleton, cuttable_names
from deployments.engine.merge import RULES
from deployments.families.calls import Call, find_calls, find_pipelines, known_calls
from deployments.stages.modular import find_modular_calls

INTRO = """\
# Pipelines

This page answers: which pipelines of diffusers {version} are served, and how?

It lists the pipelines that draw images or videos. `relay families` prints this page, and a test compares it. A
pipeline of the first table runs as three stages and draws what the plain pipeline draws, bit for bit, in each kind
of call. tests/deployments/stages/test_staged_pipelines.py tests that on the tiny checkpoint of the second column,
with each stage in a process of its own (with `--thorough`, on all).

- `calls`: `generate` draws from a prompt, `edit` also from images, `inpaint` redraws what a mask marks,
  `image_to_video` continues an image, `video_to_video` redraws a video.
- `blocks`: number of blocks of the tiny denoiser. It may be cut into shards between any two of them; each cut is
  bit-equal (tests/deployments/engine/test_cuts.py). `whole`: it cannot be cut.
- `merged`: whether forwards of several requests run as one (test_merged_pipelines.py) or one after another.
"""
MODULAR = """\

## Modular pipelines

These are pipelines that diffusers has as blocks, for checkpoints with modular_model_index.json
([structure.md](structure.md#modular-pipelines) explains them). Those with a tiny checkpoint are tested as above,
some on the tiny checkpoint of the classic pipeline of their name. Others are tried when the server starts.

"""
CANNOT: Mapping[str, str] = {
    "ChromaInpaintPipeline": "fails in diffusers itself: its transformer has no guidance_embeds",
    "QwenImageEditInpaintPipeline": "takes its size from the image",
}
"""Pipelines whose components are served but which cannot be served themselves, and why."""
REASONS: Mapping[str, str] = {
    "PAG": "sets attention processors on its denoiser, which is in another stage",
    "ControlNet|Adapter|Control|Transfer": "not tested: it needs a control image",
    "^(Kandinsky(V22)?[A-Z].*Combined|KandinskyCombined|StableCascade|IF)": "runs several pipelines one after "
    "another",
    "^LTX2.*(DFR|HDR|InContext|Condition)": "needs several videos, or another pipeline's latents",
    "^Cosmos": "needs the package cosmos_guardrail",
    "WanAnimate|VACE|EasyAnimateInpaint": "needs several videos",
    "AnyFlow|LTXCondition": "continues a video: not supported yet",
    "Prior|Refine|Upscale|SuperResolution": "does a part of another pipeline's work",
    "Helios|Framepack|DiffusionForcing|SanaWM|OmniGen": "encodes or decodes inside its loop",
    "KV": "keeps its own cache on its denoiser",
    "Kandinsky5I2I": "takes its size from the image",
}
"""Why pipelines without a tiny checkpoint are not served, by a pattern of their names; the first match counts."""
OVER_CLASSIC: Mapping[str, str] = {
    "FluxModularPipeline": "flux",
    "FluxKontextModularPipeline": "flux-kontext",
    "Flux2ModularPipeline": "flux2",
    "Flux2KleinBaseModularPipeline": "flux2-klein",
    "Flux2KleinModularPipeline": "flux2-klein",
    "StableDiffusionXLModularPipeline": "sdxl",
    "StableDiffusion3ModularPipeline": "sd3",
    "QwenImageEditPlusModularPipeline": "qwen-image-edit-plus",
    "ZImageModularPipeline": "z-image",
    "ErnieImageModularPipeline": "ernie",
    "WanModularPipeline": "wan",
    "WanImage2VideoModularPipeline": "wan21-i2v",
    "Wan22ModularPipeline": "wan22-a14b",
    "Wan22Image2VideoModularPipeline": "wan22-i2v",
    "LTXModularPipeline": "ltx-video",
    "HunyuanVideo15ModularPipeline": "hunyuan-video15",
}
"""Modular pipelines that run on the components of a classic pipeline's tiny checkpoint."""
MODULAR_REASONS: Mapping[str, str] = {
    "^WanAnimate": "needs a video, and its loop uses the VAE",
    "Vace": "needs a video: not supported yet",
    "^LTX2Modular": "not tested: it makes sound",
    "^LTX2|^Echo|^MiniMax": "makes sound with models that no stage has",
    "^Cosmos": "has no text encoder: its transformer reads the text",
    "^Anima": "has a model between its text encoder and its denoiser, which no stage has",
    "Layered": "makes several layers of one image",
    "^Ideogram": "has no default size",
}
"""The same as `REASONS`, for modular pipelines without a tiny checkpoint."""
UNKNOWN = "not tested: it has no tiny checkpoint; the server says at start whether it works"


def render_families_docs() -> str:
    """Returns the page as Markdown."""
    indexes = {name: read_index(fetch_checkpoint(f"tiny://{name}", ())) for name in TINY_MODULES}
    modular = {name: index for name, index in indexes.items() if is_modular(index)}
    over = [(name, _over(pipeline, indexes[name])) for pipeline, name in OVER_CLASSIC.items()]
    staged = {name: index for name, index in indexes.items() if name not in modular}
    related = {call.pipeline_class for index in staged.values() for call in _calls(index)}
    others = [name for name in find_pipelines() if name not in related]
    reasons = "\n".join(f"| {name} | {CANNOT.get(name) or _reason(name)} |" for name in others)
    return (
        INTRO.format(version=diffusers.__version__)
        + f"\n## Staged: {len(related)} pipeline classes\n\n"
        + _staged_table(staged.items())
        + MODULAR
        + _staged_table([*modular.items(), *over])
        + "\n| pipeline | |\n|---|---|\n"
        + "".join(f"| {name} | {_reason(name, MODULAR_REASONS)} |\n" for name in _other_modular(modular))
        + f"\n## Not served, or not tested\n\n| pipeline | |\n|---|---|\n{reasons}\n"
    )


def _other_modular(served: Mapping[str, ModelIndex]) -> Iterator[str]:
    """Yields the names of modular pipeline classes without a tiny checkpoint."""
    classes = {*OVER_CLASSIC, *(index["_class_name"] for index in served.values())}
    for name in sorted(dir(diffusers)):
        if name.endswith("ModularPipeline") and name not in {"ModularPipeline", *classes}:
            yield name


def _over(pipeline_class: str, index: ModelIndex) -> ModelIndex:
    """Returns the index that a modular pipeline with the same components would have."""
    blocks = getattr(diffusers, pipeline_class).default_blocks_name
    return dict(index) | {"_class_name": pipeline_class, BLOCKS: blocks}


def _staged_table(indexes: Iterable[tuple[str, ModelIndex]]) -> str:
    """Returns a Markdown table. indexes: the tiny checkpoints' names and indexes."""
    rows = "\n".join(_staged_row(name, index) for name, index in indexes)
    return f"| pipeline | tiny:// | calls | blocks | merged |\n|---|---|---|---|---|\n{rows}\n"


def _staged_row(name: str, index: ModelIndex) -> str:
    folder = fetch_checkpoint(f"tiny://{name}", ())
    parts = [_denoiser(folder, index, component) for component in denoiser_names(index)]
    blocks = ", ".join(dict.fromkeys(str(number) if number else "whole" for number, _ in parts))
    merged = ", ".join(dict.fromkeys("yes" if is_merged else "no" for _, is_merged in parts))
    told = find_modular_calls(folder, index).values() if is_modular(index) else _calls(index)
    calls = ", ".join(call.kind for call in told)
    return f"| {index['_class_name']} | {name} | {calls} | {blocks} | {merged} |"


def _denoiser(folder: Path, index: ModelIndex, component: str) -> tuple[int, bool]:
    model_class = getattr(diffusers, index[component][1])
    skeleton = build_skeleton(model_class, folder, component)
    return len(cuttable_names(skeleton)), model_class.__name__ in RULES


def _calls(index: ModelIndex) -> Iterator[Call]:
    calls = known_calls(find_calls(index["_class_name"]), needed_names(index)).values()
    yield from (call for call in calls if call.pipeline_class not in CANNOT)


def _reason(pipeline_class: str, reasons: Mapping[str, str] = REASONS) -> str:
    return next((why for words, why in reasons.items() if re.search(words, pipeline_class)), UNKNOWN)
