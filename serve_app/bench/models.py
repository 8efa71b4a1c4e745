"""The checkpoints that benchmarks use: made locally, without a download, with random weights."""

from dataclasses import replace
from pathlib import Path

from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.source import fetch_checkpoint, with_family
from deployments.config.model import ModelConfig
from deployments.plan.sizes import default_size
from deployments.request import GenerationRequest, Prompt
from deployments.stages.warm_up import default_request


def bench_model(name: str, folder: Path) -> ModelConfig:
    """Returns a model config.

    name: "tiny", the tiny FLUX at 64 x 64; "100M", a FLUX with 100 million parameters at 256 x 256; "VAE", the
        tiny FLUX with a VAE of a quarter of the published widths, at 256 x 256; or a checkpoint.
    """
    checkpoint, size = name, None
    if name == "tiny":
        checkpoint, size = "tiny://flux", 64
    elif name == "100M":
        checkpoint, size = str(_write_medium_flux(folder / name)), 256
    elif name == "VAE":
        checkpoint, size = str(_write_flux_with_medium_vae(folder / name)), 256
    defaults = {"width": size, "height": size}
    model = ModelConfig.model_validate({"name": name, "checkpoint": checkpoint, "defaults": defaults})
    return with_geometry(with_family(model))


def bench_request(model: ModelConfig, num_steps: int) -> GenerationRequest:
    """Returns a request for one unguided image or video, with the defaults of the model and its family."""
    request = default_request(model, default_size(model), num_steps)
    return replace(request, prompt=Prompt("a red circle", None, is_guided=False))


def fail(error: BaseException) -> None:
    """Raises the error: a benchmark ends when its engine is lost."""
    raise error


def _write_medium_flux(folder: Path) -> Path:
    """Writes the tiny FLUX with a transformer of about 100 million random parameters."""
    if not folder.exists():
        tiny = FluxPipeline.from_pretrained(fetch_checkpoint("tiny://flux", ()))
        settings = dict(tiny.transformer.config) | {
            "num_layers": 4,
            "num_single_layers": 16,
            "num_attention_heads": 8,
            "attention_head_dim": 64,
            "axes_dims_rope": (16, 24, 24),
        }
        tiny.transformer = FluxTransformer2DModel.from_config(settings)
        tiny.save_pretrained(folder)
    return folder


def _write_flux_with_medium_vae(folder: Path) -> Path:
    if not folder.exists():
        tiny = FluxPipeline.from_pretrained(fetch_checkpoint("tiny://flux", ()))
        widths = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2, "norm_num_groups": 32}
        tiny.vae = AutoencoderKL.from_config(dict(tiny.vae.config) | widths)
        tiny.save_pretrained(folder)
    return folder
