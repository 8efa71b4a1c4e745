"""Tiny pipelines that take a control image, with a ControlNet beside the denoiser."""

import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from torch import nn

from deployments.checkpoints.tiny.families import build_flux, build_sd15, build_sdxl


def build_sd15_controlnet() -> StableDiffusionControlNetPipeline:
    """Stable Diffusion 1.5 with a ControlNet of the UNet's shape."""
    return StableDiffusionControlNetPipeline(
        **build_sd15().components | {"controlnet": _of_unet(build_sd15().unet)}, requires_safety_checker=False
    )


def build_sdxl_controlnet() -> StableDiffusionXLControlNetPipeline:
    """Stable Diffusion XL with a ControlNet of the UNet's shape."""
    parts = build_sdxl()
    return StableDiffusionXLControlNetPipeline(**parts.components | {"controlnet": _of_unet(parts.unet)})


def build_flux_controlnet() -> FluxControlNetPipeline:
    """FLUX.1 with a ControlNet of one block of each kind, which reads the control image's latents."""
    parts = build_flux().components
    config = dict(parts["transformer"].config) | {"num_layers": 1, "num_single_layers": 1}
    known = {name: value for name, value in config.items() if name not in ("out_channels", "_use_default_values")}
    return FluxControlNetPipeline(**parts | {"controlnet": _loud(FluxControlNetModel(**known))})


def _of_unet(unet: nn.Module) -> nn.Module:
    """Builds a UNet's ControlNet, which scales its image down in 4 levels, as the tiny VAEs do."""
    net = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8,) * 4, load_weights_from_unet=False
    )
    return _loud(net)


def _loud(net: nn.Module) -> nn.Module:
    """Randomises the layers that are zero before training, without which a ControlNet would have no effect."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return net
