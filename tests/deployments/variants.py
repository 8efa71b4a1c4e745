"""Changes tiny checkpoints on disk into the variants that users have, and draws from them."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from cluster.ranks.place import Place
from deployments.answers import DecodeArguments, Encodings
from deployments.checkpoints.components import left_out, read_index
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.request import CallKind, GenerationRequest, InputPictures, MediaSize
from deployments.stages import load_stage
from deployments.stages.decode import Decoding
from deployments.stages.denoise import Denoising
from deployments.stages.warm_up import default_request
from tests.deployments.derived_here import with_family_here

SEED = 3
SOON_S = 60.0


def write_tiny(family: str, folder: Path) -> Path:
    shutil.copytree(fetch_checkpoint(f"tiny://{family}", ()), folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Changes values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def set_scheduler(folder: Path, class_name: str, **config: Any) -> None:
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, class_name)(**config).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", class_name])


def set_model(folder: Path, name: str, class_name: str, **config: Any) -> None:
    """Replaces a component by one with random weights; config overrides the previous config if the class is the
    same."""
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
    """Returns the config with its family and geometry, as when an app is built."""
    config = ModelConfig(name="variant", checkpoint=str(folder), family=family, **settings)
    return with_geometry(with_family_here(config))


def build_request(model: ModelConfig, kind: CallKind | None = None, **changes: Any) -> GenerationRequest:
    """Returns a request of 3 steps for 64 x 64 pixels; a video has 5 frames.

    kind: the kind of call; None: the one that the checkpoint was saved for.
    """
    call = model.architecture.call if kind is None else model.architecture.calls[kind]
    size = MediaSize(64, 64, 5 if call.media == "video" else 1)
    request = default_request(model, size, 3, call=call)
    return replace(request, prompt=replace(request.prompt, text="a red cat"), seed=SEED, **changes)


def load_denoising(model: ModelConfig) -> Denoising:
    return load_ranks(model)


def load_ranks(model: ModelConfig, **settings: Any) -> Denoising:
    """Loads all ranks of a config in this process and returns rank 0, connected."""
    config = TransformerConfig(**settings)
    head = load_stage("denoise", model, config)
    if config.num_ranks == 1:
        head.connect(None, _raise)
        return head
    others = [load_stage("worker", model, config, rank) for rank in range(1, config.num_ranks)]
    rendezvous = head.open_rendezvous("127.0.0.1", [Place("node", None)] * config.num_ranks)
    with ThreadPoolExecutor(config.num_ranks) as threads:
        for joining in [threads.submit(rank.connect, rendezvous, _raise) for rank in (head, *others)]:
            joining.result(SOON_S)
    if head.adapters is not None:
        head.adapters.ask_ranks = lambda method, *args: [getattr(rank, method)(*args) for rank in others]
    return head


def encode(model: ModelConfig, request: GenerationRequest, pictures: InputPictures | None = None) -> Encodings:
    return load_stage("encode", model, EncoderConfig()).encode(request, pictures)


def denoise(stage: Denoising, encodings: Encodings, request: GenerationRequest, **given: Any) -> DecodeArguments:
    """Denoises one request.

    given: the input images (`pictures`) and what the VAE prepared of them (`posteriors`).
    """
    seat = stage.join()
    try:
        return stage.denoise(seat, encodings, request, **given)
    finally:
        stage.leave(seat)


def draw_staged(
    model: ModelConfig, request: GenerationRequest, pictures: InputPictures | None = None, **vae: Any
) -> np.ndarray:
    """Returns frames [F, H, W, 3], drawn by the three stages.

    pictures: input images.
    """
    last, arguments = denoise_staged(model, request, pictures, **vae)
    return last.decode(arguments, request)


def denoise_staged(
    model: ModelConfig, request: GenerationRequest, pictures: InputPictures | None = None, **vae: Any
) -> tuple[Decoding, DecodeArguments]:
    """Returns the decode stage and what it is to decode."""
    encodings, last = encode(model, request, pictures), load_stage("decode", model, VaeConfig(**vae))
    posteriors = () if pictures is None else last.prepare(encodings, request, pictures)
    stage = load_denoising(model)
    try:
        return last, denoise(stage, encodings, request, posteriors=posteriors, pictures=pictures)
    finally:
        stage.close()


def draw_plain(checkpoint: Path | DiffusionPipeline, request: GenerationRequest, **call: Any) -> np.ndarray:
    """Returns frames [F, H, W, 3], drawn by diffusers itself.

    call: arguments that replace those of the request, or add to them.
    """
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
