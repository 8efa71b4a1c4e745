"""Tiny image pipelines of earlier designs: with T5 and CLIP as text encoders, or with a UNet."""

from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)

from deployments.checkpoints.tiny.families import build_qwen_image, build_sd3, build_sd15
from deployments.checkpoints.tiny.language import build_bert
from deployments.checkpoints.tiny.sizes import HEADS, LATENT_SIZE, ROPE_AXES
from deployments.checkpoints.tiny.text import (
    TEXT_WIDTH,
    build_clip_encoder,
    build_clip_tokenizer,
    build_t5,
    build_t5_encoder,
    build_t5_tokenizer,
)
from deployments.checkpoints.tiny.vaes import build_flux_vae, build_sd_vae
from deployments.checkpoints.tiny.vision import build_qwen_processor


def build_sd35() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium: the first blocks attend twice."""
    parts = build_sd3().components
    sd3 = parts["transformer"].config
    parts["transformer"] = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        num_layers=4,
        joint_attention_dim=sd3.joint_attention_dim,
        caption_projection_dim=sd3.caption_projection_dim,
        pooled_projection_dim=sd3.pooled_projection_dim,
        pos_embed_max_size=sd3.pos_embed_max_size,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
        **HEADS,
    )
    return StableDiffusion3Pipeline(**parts)


def build_lcm() -> LatentConsistencyModelPipeline:
    """A latent consistency model of SD 1.5: guidance embedded, a scheduler that draws noise."""
    parts = build_sd15().components
    config = dict(parts["unet"].config) | {"time_cond_proj_dim": 32, "_use_default_values": []}
    parts["unet"] = UNet2DConditionModel.from_config(config)
    parts["scheduler"] = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def build_sd15_inpaint() -> StableDiffusionInpaintPipeline:
    """Stable Diffusion 1.5 for inpainting: 4 noise channels, then the masked image's latents and the mask."""
    parts = build_sd15().components
    config = dict(parts["unet"].config) | {"in_channels": 9, "_use_default_values": []}
    parts["unet"] = UNet2DConditionModel.from_config(config)
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def build_pixart_alpha() -> PixArtAlphaPipeline:
    """PixArt-alpha: T5 as text encoder."""
    return PixArtAlphaPipeline(**_build_pixart())


def build_pixart_sigma() -> PixArtSigmaPipeline:
    """PixArt-sigma: the model of PixArt-alpha, for larger images."""
    return PixArtSigmaPipeline(**_build_pixart())


def _build_pixart() -> dict[str, Any]:
    return {
        **build_t5(),
        "vae": build_sd_vae(),
        "transformer": PixArtTransformer2DModel(
            num_layers=3,
            cross_attention_dim=128,
            sample_size=LATENT_SIZE,
            caption_channels=TEXT_WIDTH,
            **HEADS,
        ),
        "scheduler": DPMSolverMultistepScheduler(),
    }


def build_cogview3() -> CogView3PlusPipeline:
    """CogView 3 Plus: T5 as text encoder; images up to 256 px."""
    return CogView3PlusPipeline(
        **build_t5(),
        vae=build_sd_vae(),
        transformer=CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=3,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=64,
            condition_dim=16,
            pos_embed_max_size=16,
            sample_size=LATENT_SIZE,
            **HEADS,
        ),
        scheduler=CogVideoXDDIMScheduler(),
    )


def build_hunyuan_dit() -> HunyuanDiTPipeline:
    """Hunyuan-DiT: the second half of the blocks reads the outputs of the first half, as in a UNet."""
    tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    return HunyuanDiTPipeline(
        vae=build_sd_vae(),
        text_encoder=build_bert(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_t5_encoder(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=HunyuanDiT2DModel(
            in_channels=4,
            patch_size=2,
            activation_fn="gelu-approximate",
            sample_size=LATENT_SIZE,
            hidden_size=128,
            num_layers=4,
            mlp_ratio=2.0,
            learn_sigma=True,
            cross_attention_dim=TEXT_WIDTH,
            cross_attention_dim_t5=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            text_len=77,
            text_len_t5=256,
            norm_type="layer_norm",
            **HEADS,
        ),
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_kandinsky5() -> Kandinsky5T2IPipeline:
    """Kandinsky 5 for images: Qwen2.5-VL and CLIP as text encoders."""
    return Kandinsky5T2IPipeline(**build_kandinsky5_parts(visual_cond=False), vae=build_flux_vae())


def build_kandinsky5_parts(visual_cond: bool) -> dict[str, Any]:
    """All components but the VAE. visual_cond: whether the denoiser also reads an image's latents and a mask."""
    qwen, clip_tokenizer = build_qwen_image(), build_clip_tokenizer()
    return {
        "transformer": Kandinsky5Transformer3DModel(
            in_visual_dim=16,
            out_visual_dim=16,
            in_text_dim=TEXT_WIDTH,
            in_text_dim2=TEXT_WIDTH,
            time_dim=64,
            model_dim=64,
            ff_dim=128,
            num_text_blocks=1,
            num_visual_blocks=3,
            axes_dims=ROPE_AXES,
            visual_cond=visual_cond,
        ),
        "text_encoder": qwen.text_encoder,
        "tokenizer": build_qwen_processor(qwen.tokenizer),
        "text_encoder_2": build_clip_encoder(clip_tokenizer),
        "tokenizer_2": clip_tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
