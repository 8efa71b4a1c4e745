"""The six families that most tests use: the published structure, with small widths.

Lower limits: the input of every Linear of a denoiser is a multiple of 64 features (bitsandbytes' 4-bit block), and
a denoiser has enough blocks for 3 shards. VAEs have 4 levels, hence a factor of 8, and the family's latent
channels.
"""

from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from deployments.checkpoints.tiny.sizes import HEADS, LATENT_SIZE, ROPE_AXES
from deployments.checkpoints.tiny.text import (
    TEXT_WIDTH,
    build_clip_encoder,
    build_clip_tokenizer,
    build_projected_clip_encoder,
    build_qwen_encoder,
    build_qwen_tokenizer,
    build_t5_encoder,
    build_t5_tokenizer,
    build_umt5_encoder,
)
from deployments.checkpoints.tiny.vaes import build_flux_vae, build_image_vae, build_qwen_vae, build_wan_vae

_NUM_BLOCKS = 4


def build_flux() -> FluxPipeline:
    """FLUX.1-dev: 4 double and 4 single blocks, guidance embedded, CLIP pooled and T5 sequence embeddings."""
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=build_flux_vae(),
        text_encoder=build_clip_encoder(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=build_t5_encoder(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=_NUM_BLOCKS,
            num_single_layers=_NUM_BLOCKS,
            **HEADS,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=ROPE_AXES,
        ),
    )


def build_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: cross-attention at the outer level and in the middle, no safety checker."""
    tokenizer = build_clip_tokenizer()
    return StableDiffusionPipeline(
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        vae=build_image_vae(latent_channels=4, scaling_factor=0.18215, use_quant_conv=True),
        text_encoder=build_clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: cross-attention at the inner level, two CLIP encoders, size embeddings."""
    tokenizer, tokenizer_2 = build_clip_tokenizer(), build_clip_tokenizer()
    num_size_ids, size_id_width = 6, 32
    return StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        vae=build_image_vae(latent_channels=4, scaling_factor=0.13025, use_quant_conv=True),
        text_encoder=build_clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_projected_clip_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        unet=UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(64, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=2 * TEXT_WIDTH,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=size_id_width,
            projection_class_embeddings_input_dim=num_size_ids * size_id_width + TEXT_WIDTH,
        ),
    )


def build_sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: 4 joint blocks, two projected CLIP encoders and T5, images up to 512 px.

    T5 must be at least as wide as both CLIPs together: the pipeline pads their embeddings to T5's width, and would
    silently truncate them if T5 were narrower.
    """
    t5_width = 3 * TEXT_WIDTH
    tokenizer, tokenizer_2, tokenizer_3 = build_clip_tokenizer(), build_clip_tokenizer(), build_t5_tokenizer()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_image_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=build_projected_clip_encoder(tokenizer, hidden_act="quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=build_projected_clip_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        text_encoder_3=build_t5_encoder(tokenizer_3, t5_width),
        tokenizer_3=tokenizer_3,
        transformer=SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            num_layers=_NUM_BLOCKS,
            **HEADS,
            joint_attention_dim=t5_width,
            caption_projection_dim=128,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=32,
        ),
    )


def build_qwen_image() -> QwenImagePipeline:
    """Qwen-Image: 4 double blocks, Qwen2.5-VL as text encoder, a video VAE that decodes one frame."""
    tokenizer = build_qwen_tokenizer()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
        ),
        vae=build_qwen_vae(),
        text_encoder=build_qwen_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            num_layers=_NUM_BLOCKS,
            **HEADS,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=ROPE_AXES,
        ),
    )


def build_wan() -> WanPipeline:
    """Wan 2.1 text to video: 4 blocks, UniPC over flow sigmas; the VAE packs 4 frames into one."""
    tokenizer = build_t5_tokenizer()
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
        ),
        vae=build_wan_vae(),
        text_encoder=build_umt5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=WanTransformer3DModel(
            num_layers=_NUM_BLOCKS,
            **HEADS,
            text_dim=TEXT_WIDTH,
            ffn_dim=256,
        ),
    )
