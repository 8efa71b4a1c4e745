"""Tiny pipelines of Wan and of models derived from it."""

from typing import Any

from diffusers import (
    LucyEditPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from deployments.checkpoints.tiny.sizes import HEADS
from deployments.checkpoints.tiny.text import TEXT_WIDTH, build_t5_tokenizer, build_umt5_encoder
from deployments.checkpoints.tiny.vaes import build_wan22_vae, build_wan_vae
from deployments.checkpoints.tiny.vision import build_clip_vision

_NUM_BLOCKS = 3
_I2V_CHANNELS = 36
"""Input channels: 16 of the noise, 16 of the image, 4 of the mask."""


def build_wan22_a14b() -> WanPipeline:
    """Wan 2.2 text to video: an expert for high noise and one for low noise."""
    return WanPipeline(
        **_build_parts(),
        transformer=_build_transformer(),
        transformer_2=_build_transformer(),
        boundary_ratio=0.875,
    )


def build_wan22_5b() -> WanPipeline:
    """Wan 2.2 5B: a VAE with one latent per 16 x 16 pixels, and a timestep for each token."""
    return WanPipeline(
        **_build_parts() | {"vae": build_wan22_vae()},
        transformer=_build_transformer(in_channels=48, out_channels=48),
        expand_timesteps=True,
    )


def build_wan21_i2v() -> WanImageToVideoPipeline:
    """Wan 2.1 image to video: the denoiser also reads CLIP's embedding of the image."""
    processor, encoder = build_clip_vision()
    return WanImageToVideoPipeline(
        **_build_parts(),
        transformer=_build_transformer(in_channels=_I2V_CHANNELS, image_dim=64, added_kv_proj_dim=128),
        image_encoder=encoder,
        image_processor=processor,
    )


def build_wan22_i2v() -> WanImageToVideoPipeline:
    """Wan 2.2 image to video: two experts, no CLIP."""
    return WanImageToVideoPipeline(
        **_build_parts(),
        transformer=_build_transformer(in_channels=_I2V_CHANNELS),
        transformer_2=_build_transformer(in_channels=_I2V_CHANNELS),
        boundary_ratio=0.9,
    )


def build_lucy_edit() -> LucyEditPipeline:
    """Lucy Edit: edits a video, whose latents the denoiser reads beside the noise."""
    return LucyEditPipeline(**_build_parts(), transformer=_build_transformer(in_channels=32))


def build_skyreels2() -> SkyReelsV2Pipeline:
    """SkyReels V2 text to video."""
    return SkyReelsV2Pipeline(
        **_build_parts(),
        transformer=SkyReelsV2Transformer3DModel(
            num_layers=_NUM_BLOCKS, text_dim=TEXT_WIDTH, ffn_dim=128, **HEADS
        ),
    )


def _build_parts() -> dict[str, Any]:
    tokenizer = build_t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": build_umt5_encoder(tokenizer),
        "vae": build_wan_vae(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _build_transformer(**changes: Any) -> WanTransformer3DModel:
    config = {"in_channels": 16, "out_channels": 16} | changes
    return WanTransformer3DModel(num_layers=_NUM_BLOCKS, text_dim=TEXT_WIDTH, ffn_dim=256, **config, **HEADS)
