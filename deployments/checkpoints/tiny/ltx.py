"""Tiny pipelines of LTX: videos, and videos with sound."""

from typing import Any

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from deployments.checkpoints.tiny.language import build_gemma3
from deployments.checkpoints.tiny.sizes import HEADS
from deployments.checkpoints.tiny.text import TEXT_WIDTH, build_qwen_tokenizer, build_t5

_NUM_BLOCKS = 3


def build_ltx_video() -> LTXPipeline:
    """LTX-Video: T5 as text encoder; the statistics of latents are buffers of the VAE."""
    return LTXPipeline(**_build_ltx_video_parts())


def build_ltx_video_i2v() -> LTXImageToVideoPipeline:
    """LTX-Video with a given first frame."""
    return LTXImageToVideoPipeline(**_build_ltx_video_parts())


def _build_ltx_video_parts() -> dict[str, Any]:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    vae.latents_mean.normal_()
    return {
        **build_t5(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
        "transformer": LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            cross_attention_dim=128,
            num_layers=_NUM_BLOCKS,
            caption_channels=TEXT_WIDTH,
            **HEADS,
        ),
    }


def build_ltx2() -> LTX2Pipeline:
    """LTX-2: one denoiser for video and sound, Gemma 3 and two connectors as text encoder, a vocoder."""
    return LTX2Pipeline(**_build_ltx2_parts())


def build_ltx2_i2v() -> LTX2ImageToVideoPipeline:
    """LTX-2 with a given first frame."""
    return LTX2ImageToVideoPipeline(**_build_ltx2_parts())


def _build_ltx2_connectors(num_hidden_states: int) -> LTX2TextConnectors:
    connector = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 1,
        "num_learnable_registers": None,
    }
    return LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=num_hidden_states,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in connector.items()},
    )


def _build_ltx2_parts() -> dict[str, Any]:
    tokenizer = build_qwen_tokenizer()
    num_hidden_states, audio_channels, num_mel_bins = 3, 2, 8
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(16, 32, 64),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4,
            upsample_residual=(False,) * 3,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            latent_channels=audio_channels,
            mel_bins=num_mel_bins,
            resolution=32,
        ),
        "text_encoder": build_gemma3(tokenizer),
        "tokenizer": tokenizer,
        "connectors": _build_ltx2_connectors(num_hidden_states),
        "transformer": _build_ltx2_transformer(),
        "vocoder": LTX2Vocoder(
            in_channels=audio_channels * num_mel_bins,
            hidden_channels=32,
            out_channels=1,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
    }


def _build_ltx2_transformer() -> LTX2VideoTransformer3DModel:
    return LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=_NUM_BLOCKS,
        caption_channels=TEXT_WIDTH,
        rope_double_precision=False,
    )
