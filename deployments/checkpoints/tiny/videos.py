"""Tiny video pipelines other than Wan's and LTX's."""

from typing import Any

from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMochi,
    ClassifierFreeGuidance,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    LattePipeline,
    LatteTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from transformers import Qwen2_5_VLTextModel

from deployments.checkpoints.tiny.earlier_images import build_kandinsky5_parts
from deployments.checkpoints.tiny.families import build_sd15, build_sdxl
from deployments.checkpoints.tiny.language import (
    build_byt5,
    build_chat_tokenizer,
    build_language_model,
)
from deployments.checkpoints.tiny.sizes import HEADS, LATENT_SIZE, ROPE_AXES
from deployments.checkpoints.tiny.text import (
    TEXT_WIDTH,
    build_clip_encoder,
    build_clip_tokenizer,
    build_qwen_encoder,
    build_t5,
)
from deployments.checkpoints.tiny.vaes import build_hunyuan_video_vae, build_sd_vae, build_wan_vae
from deployments.checkpoints.tiny.vision import build_siglip

_NUM_BLOCKS = 3
_MAX_TEXT = 16
"""Maximum number of text tokens, for denoisers whose config sets it."""


def build_hunyuan_video() -> HunyuanVideoPipeline:
    """HunyuanVideo: Llama and CLIP as text encoders, 2 double and 2 single blocks."""
    tokenizer, clip_tokenizer = build_chat_tokenizer(), build_clip_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder=build_language_model("Llama", tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_clip_encoder(clip_tokenizer),
        tokenizer_2=clip_tokenizer,
        transformer=HunyuanVideoTransformer3DModel(
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            rope_axes_dim=ROPE_AXES,
            **HEADS,
        ),
        vae=build_hunyuan_video_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def build_hunyuan_video15() -> HunyuanVideo15Pipeline:
    """HunyuanVideo 1.5: Qwen2.5-VL and ByT5 as text encoders, guidance by a guider component."""
    return HunyuanVideo15Pipeline(**_build_hunyuan_video15_parts("t2v"))


def build_hunyuan_video15_i2v() -> HunyuanVideo15ImageToVideoPipeline:
    """HunyuanVideo 1.5 with a given first frame, which SigLIP embeds."""
    processor, encoder = build_siglip()
    return HunyuanVideo15ImageToVideoPipeline(
        **_build_hunyuan_video15_parts("i2v"), feature_extractor=processor, image_encoder=encoder
    )


def _build_hunyuan_video15_parts(task_type: str) -> dict[str, Any]:
    tokenizer, (byt5_tokenizer, byt5) = build_chat_tokenizer(), build_byt5()
    channels = 8
    return {
        "text_encoder": Qwen2_5_VLTextModel(build_qwen_encoder(tokenizer).config.text_config),
        "tokenizer": tokenizer,
        "text_encoder_2": byt5,
        "tokenizer_2": byt5_tokenizer,
        "transformer": HunyuanVideo15Transformer3DModel(
            in_channels=2 * channels + 1,  # with an image's latents and a mask
            out_channels=channels,
            num_layers=_NUM_BLOCKS,
            num_refiner_layers=1,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=TEXT_WIDTH,
            image_embed_dim=TEXT_WIDTH,
            rope_axes_dim=ROPE_AXES,
            target_size=64,
            task_type=task_type,
            **HEADS,
        ),
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=channels, block_out_channels=(32,) * 5, layers_per_block=1
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def build_cogvideox() -> CogVideoXPipeline:
    """CogVideoX: T5 as text encoder; 64 px, 9 frames."""
    return CogVideoXPipeline(
        **build_t5(),
        vae=AutoencoderKLCogVideoX(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2),
        transformer=CogVideoXTransformer3DModel(
            num_layers=_NUM_BLOCKS,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=64,
            sample_width=LATENT_SIZE,
            sample_height=LATENT_SIZE,
            sample_frames=9,
            **HEADS,
        ),
        scheduler=CogVideoXDPMScheduler(),
    )


def build_mochi() -> MochiPipeline:
    """Mochi 1: T5 as text encoder; one latent frame per 6 frames."""
    return MochiPipeline(
        **build_t5(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
        ),
        transformer=MochiTransformer3DModel(
            num_layers=_NUM_BLOCKS,
            pooled_projection_dim=64,
            text_embed_dim=TEXT_WIDTH,
            max_sequence_length=_MAX_TEXT,
            **HEADS,
        ),
    )


def build_sana_video() -> SanaVideoPipeline:
    """SANA-Video: linear attention, Gemma 2 as text encoder, Wan's VAE."""
    tokenizer = build_chat_tokenizer()
    return SanaVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=build_language_model("Gemma2", tokenizer),
        vae=build_wan_vae(),
        transformer=SanaVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_layers=_NUM_BLOCKS,
            num_cross_attention_heads=4,
            cross_attention_head_dim=32,
            cross_attention_dim=128,
            caption_channels=TEXT_WIDTH,
            sample_size=LATENT_SIZE,
            patch_size=(1, 2, 2),
            **HEADS,
        ),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )


def build_kandinsky5_video() -> Kandinsky5T2VPipeline:
    """Kandinsky 5 for videos: the VAE of HunyuanVideo."""
    return Kandinsky5T2VPipeline(**build_kandinsky5_parts(visual_cond=True), vae=build_hunyuan_video_vae())


def build_latte() -> LattePipeline:
    """Latte: blocks over space and over time alternate; 16 frames."""
    return LattePipeline(
        **build_t5(),
        vae=build_sd_vae(),
        transformer=LatteTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=24,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=96,
            sample_size=LATENT_SIZE,
            patch_size=2,
            caption_channels=TEXT_WIDTH,
            video_length=16,
            norm_type="ada_norm_single",
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        ),
        scheduler=DDIMScheduler(),
    )


def build_animatediff() -> AnimateDiffPipeline:
    """AnimateDiff: SD 1.5's UNet with layers over time."""
    sd15 = build_sd15()
    return AnimateDiffPipeline(
        vae=sd15.vae,
        text_encoder=sd15.text_encoder,
        tokenizer=sd15.tokenizer,
        unet=sd15.unet,
        motion_adapter=_build_motion_adapter((64, 128)),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )


def build_animatediff_sdxl() -> AnimateDiffSDXLPipeline:
    """AnimateDiff with SDXL's UNet."""
    parts = build_sdxl().components | {"motion_adapter": _build_motion_adapter((64, 64))}
    parts["scheduler"] = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return AnimateDiffSDXLPipeline(**parts)


def _build_motion_adapter(widths: tuple[int, ...]) -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=widths,
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )
