"""The page that says which of diffusers' pipelines run staged, in shards, merged; and why not where not.

Imports torch: what can be cut is asked of the models themselves.
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

Which pipelines of diffusers {version} that draw pictures or videos are served, and how. `relay families` prints
this page; a test compares. A pipeline of the first table runs as three stages and draws what the plain pipeline
draws, bit for bit, in every kind of call named: tests/deployments/stages/test_staged_pipelines.py shows it on the
tiny checkpoint of the second column, each stage in a process of its own (with `--thorough`, on all). Blocks: of
the tiny denoiser, which may be cut into shards between any two, each cut bit-equal
(tests/deployments/engine/test_cuts.py). Merged: forwards of several requests run as one
(test_merged_pipelines.py); others run one after another.

`generate` draws from a prompt, `edit` from pictures too, `inpaint` where a mask says, `image_to_video` goes on
from a picture, `video_to_video` draws a video anew.
"""
MODULAR = """\

## Modular pipelines

Pipelines that diffusers has as blocks, of checkpoints with modular_model_index.json
([structure.md](structure.md#modular-pipelines) says how). Those of which there is a tiny checkpoint are shown as
above, some over that of the classic pipeline of their name; a checkpoint of another is tried at its start.

"""
CANNOT: Mapping[str, str] = {
    "ChromaInpaintPipeline": "fails in diffusers itself: its transformer has no guidance_embeds",
    "QwenImageEditInpaintPipeline": "takes its size from the picture",
}
"""Of kinds of call over components that are served."""
REASONS: Mapping[str, str] = {
    "PAG": "sets attention processors on its denoiser, which is in another stage",
    "ControlNet|Adapter|Control|Transfer": "not tried: a control picture goes in",
    "^(Kandinsky(V22)?[A-Z].*Combined|KandinskyCombined|StableCascade|IF)": "several pipelines one after another",
    "^LTX2.*(DFR|HDR|InContext|Condition)": "several videos go in, or another pipeline's latents",
    "^Cosmos": "needs cosmos_guardrail, which is another package",
    "WanAnimate|VACE|EasyAnimateInpaint": "several videos go in",
    "AnyFlow|LTXCondition": "a video goes in as the beginning of a longer one: not yet",
    "Prior|Refine|Upscale|SuperResolution": "a part of another pipeline's work",
    "Helios|Framepack|DiffusionForcing|SanaWM|OmniGen": "encodes or decodes inside its loop",
    "KV": "keeps a cache of its own on its denoiser",
    "Kandinsky5I2I": "takes its size from the picture",
}
"""Of pipelines without a tiny checkpoint, by what their names hold; the first that fits."""
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
"""Modular pipelines over the components of a classic tiny checkpoint."""
MODULAR_REASONS: Mapping[str, str] = {
    "^WanAnimate": "a video goes in, and its loop asks the VAE",
    "Vace": "a video goes in: not yet",
    "^LTX2Modular": "not tried: makes sound",
    "^LTX2|^Echo|^MiniMax": "makes sound, by models that no stage has",
    "^Cosmos": "has no text encoder: its transformer reads the words",
    "^Anima": "has a model between its text encoder and its denoiser, which no stage has",
    "Layered": "makes several pictures that lie over each other",
    "^Ideogram": "has no size by default",
}
"""Of modular pipelines without a tiny checkpoint, as `REASONS`."""
UNKNOWN = "not tried: there is no tiny checkpoint of it; a start tells"


def render_families_docs() -> str:
    """Markdown."""
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
        + f"\n## Not, or not shown\n\n| pipeline | |\n|---|---|\n{reasons}\n"
    )


def _other_modular(served: Mapping[str, ModelIndex]) -> Iterator[str]:
    """Classes of which there is no tiny checkpoint."""
    classes = {*OVER_CLASSIC, *(index["_class_name"] for index in served.values())}
    for name in sorted(dir(diffusers)):
        if name.endswith("ModularPipeline") and name not in {"ModularPipeline", *classes}:
            yield name


def _over(pipeline_class: str, index: ModelIndex) -> ModelIndex:
    """As it would be written for the same components."""
    blocks = getattr(diffusers, pipeline_class).default_blocks_name
    return dict(index) | {"_class_name": pipeline_class, BLOCKS: blocks}


def _staged_table(indexes: Iterable[tuple[str, ModelIndex]]) -> str:
    """indexes: of tiny checkpoints, by name."""
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
