"""Tiny checkpoints changed on disk, as people's are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from deployments.checkpoints.components import left_out, read_index
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.source import fetch_checkpoint, with_family
from deployments.config import EncoderConfig, ModelConfig, TransformerConfig, VaeConfig
from deployments.request import CallKind, DecodeArguments, Encodings, GenerationRequest, InputPictures, MediaSize
from deployments.stages import load_stage
from deployments.stages.decode import Decoding
from deployments.stages.denoise import Denoising
from deployments.warm_up import default_request

SEED = 3


def write_tiny(family: str, folder: Path) -> Path:
    shutil.copytree(fetch_checkpoint(f"tiny://{family}", ()), folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """A JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def set_scheduler(folder: Path, class_name: str, **config: Any) -> None:
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, class_name)(**config).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", class_name])


def set_model(folder: Path, name: str, class_name: str, **config: Any) -> None:
    """Random weights for a component; what config does not say is as it was, if the class is the same."""
    model_class, path = getattr(diffusers, class_name), folder / name
    was = model_class.load_config(path)
    own = {key: value for key, value in was.items() if not key.startswith("_")}
    own = own if was["_class_name"] == class_name else {}
    shutil.rmtree(path)
    torch.manual_seed(0)
    model = model_class(**own | config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    model.save_pretrained(path)
    edit(folder / "model_index.json", **{name: ["diffusers", class_name]})


def read_model(folder: Path, family: str | None = None, **settings: Any) -> ModelConfig:
    """As an app is built with it."""
    config = ModelConfig(name="variant", checkpoint=str(folder), family=family, **settings)
    return with_geometry(with_family(config))


def build_request(model: ModelConfig, kind: CallKind | None = None, **changes: Any) -> GenerationRequest:
    """kind: of call; None: what the checkpoint was saved for."""
    call = model.architecture.call if kind is None else model.architecture.calls[kind]
    size = MediaSize(64, 64, 5 if call.media == "video" else 1)
    request = default_request(model, size, 3, call=call)
    return replace(request, prompt=replace(request.prompt, text="a red cat"), seed=SEED, **changes)


def load_denoising(model: ModelConfig) -> Denoising:
    stage = load_stage("denoise", model, TransformerConfig())
    stage.connect(None, _raise)
    return stage


def encode(model: ModelConfig, request: GenerationRequest, pictures: InputPictures | None = None) -> Encodings:
    return load_stage("encode", model, EncoderConfig()).encode(request, pictures)


def denoise(stage: Denoising, encodings: Encodings, request: GenerationRequest, **given: Any) -> DecodeArguments:
    """given: what was prepared of pictures that go in, and those."""
    seat = stage.join()
    try:
        return stage.denoise(seat, encodings, request, **given)
    finally:
        stage.leave(seat)


def draw_staged(
    model: ModelConfig, request: GenerationRequest, pictures: InputPictures | None = None, **vae: Any
) -> np.ndarray:
    """[F, H, W, 3] by the three stages. pictures: that go in."""
    last, arguments = denoise_staged(model, request, pictures, **vae)
    return last.decode(arguments, request)


def denoise_staged(
    model: ModelConfig, request: GenerationRequest, pictures: InputPictures | None = None, **vae: Any
) -> tuple[Decoding, DecodeArguments]:
    """The last of the three stages, and what it is to decode."""
    encodings, last = encode(model, request, pictures), load_stage("decode", model, VaeConfig(**vae))
    posteriors = () if pictures is None else last.prepare(encodings, request, pictures)
    stage = load_denoising(model)
    try:
        return last, denoise(stage, encodings, request, posteriors=posteriors, pictures=pictures)
    finally:
        stage.close()


def draw_plain(checkpoint: Path | DiffusionPipeline, request: GenerationRequest, **call: Any) -> np.ndarray:
    """[F, H, W, 3] by diffusers itself. call: in place of what the request says, or beside it."""
    pipe: Any = checkpoint
    if isinstance(checkpoint, Path):
        pipe = DiffusionPipeline.from_pretrained(checkpoint, **dict.fromkeys(left_out(read_index(checkpoint))))
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(request.seed)
    asked = {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
    }
    if request.num_frames > 1:
        asked["num_frames"] = request.num_frames
    generator = torch.Generator().manual_seed(request.seed)
    settings = {"prompt": request.prompt.text, "generator": generator, "output_type": "np", "return_dict": False}
    output = pipe(**settings | asked | call)[0]
    frames = output[0] if output.ndim == 5 else output
    return (frames * 255).round().astype(np.uint8)


def _raise(error: BaseException) -> None:
    raise error
