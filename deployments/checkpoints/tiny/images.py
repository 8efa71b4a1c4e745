"""Tiny image pipelines with language models as text encoders and a denoiser with one list of blocks."""

from diffusers import (
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PRXPipeline,
    PRXTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from deployments.checkpoints.tiny.language import (
    build_chat_tokenizer,
    build_language_model,
    build_mistral3,
    build_qwen3_vl,
)
from deployments.checkpoints.tiny.sizes import HEADS, LATENT_SIZE, ROPE_AXES
from deployments.checkpoints.tiny.text import TEXT_WIDTH, build_qwen_tokenizer
from deployments.checkpoints.tiny.vaes import (
    build_dc_vae,
    build_flux2_vae,
    build_flux_vae,
    build_qwen_vae,
    build_sd_vae,
)

_NUM_BLOCKS = 3
_DC_CHANNELS = 8


def build_z_image() -> ZImagePipeline:
    """Z-Image: Qwen3 as text encoder; one refiner for latents and one for text before the blocks."""
    tokenizer = build_chat_tokenizer()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_flux_vae(),
        text_encoder=build_language_model("Qwen3", tokenizer),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            dim=128,
            n_layers=_NUM_BLOCKS,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=ROPE_AXES,
        ),
    )


def build_ideogram4() -> Ideogram4Pipeline:
    """Ideogram 4: layers throughout Qwen3-VL as text encoder; guidance by a second transformer without text."""
    tokenizer, num_text_layers, num_read = build_chat_tokenizer(), 36, 13
    transformers = {
        name: Ideogram4Transformer2DModel(
            in_channels=64,
            num_layers=_NUM_BLOCKS,
            attention_head_dim=32,
            num_attention_heads=4,
            intermediate_size=256,
            adaln_dim=64,
            llm_features_dim=num_read * TEXT_WIDTH,
            mrope_section=(6, 5, 5),
        )
        for name in ("transformer", "unconditional_transformer")
    }
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=build_flux2_vae(),
        text_encoder=build_qwen3_vl(tokenizer, num_text_layers),
        tokenizer=tokenizer,
        **transformers,
    )


def build_lumina2() -> Lumina2Pipeline:
    """Lumina Image 2: Gemma 2 as text encoder; one refiner for latents and one for text before the blocks."""
    tokenizer = build_chat_tokenizer()
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=build_flux_vae(),
        text_encoder=build_language_model("Gemma2", tokenizer),
        tokenizer=tokenizer,
        transformer=Lumina2Transformer2DModel(
            sample_size=LATENT_SIZE,
            hidden_size=128,
            num_layers=_NUM_BLOCKS,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=4,
            axes_dim_rope=ROPE_AXES,
            cap_feat_dim=TEXT_WIDTH,
        ),
    )


def build_lumina() -> LuminaPipeline:
    """Lumina-Next: Gemma as text encoder."""
    tokenizer = build_chat_tokenizer(marks_start=True)
    transformer = LuminaNextDiT2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=4,
        hidden_size=128,
        num_layers=_NUM_BLOCKS,
        num_attention_heads=4,
        num_kv_heads=4,
        multiple_of=16,
        cross_attention_dim=TEXT_WIDTH,
    )
    transformer.pad_token.data.normal_()  # diffusers leaves it uninitialised
    return LuminaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=build_sd_vae(),
        text_encoder=build_language_model("Gemma", tokenizer),
        tokenizer=tokenizer,
    )


def build_krea2() -> Krea2Pipeline:
    """Krea 2: several layers of Qwen3-VL as text encoder, fused inside the model."""
    tokenizer, num_layers = build_qwen_tokenizer(), 3
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=build_qwen_vae(),
        text_encoder=build_qwen3_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=Krea2Transformer2DModel(
            num_layers=_NUM_BLOCKS,
            num_key_value_heads=2,
            intermediate_size=128,
            timestep_embed_dim=32,
            text_hidden_dim=TEXT_WIDTH,
            num_text_layers=num_layers,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=TEXT_WIDTH,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=ROPE_AXES,
            **HEADS,
        ),
        text_encoder_select_layers=tuple(range(1, num_layers + 1)),
    )


def build_ernie() -> ErnieImagePipeline:
    """ERNIE-Image: Ministral as text encoder; without the model that rewrites prompts."""
    tokenizer = build_chat_tokenizer()
    return ErnieImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_flux2_vae(),
        text_encoder=build_mistral3(tokenizer, "Model"),
        tokenizer=tokenizer,
        transformer=ErnieImageTransformer2DModel(
            hidden_size=128,
            num_attention_heads=4,
            num_layers=_NUM_BLOCKS,
            ffn_hidden_size=128,
            in_channels=64,
            out_channels=64,
            text_in_dim=TEXT_WIDTH,
            rope_axes_dim=ROPE_AXES,
        ),
    )


def build_sana() -> SanaPipeline:
    """Sana: linear attention, Gemma 2 as text encoder, a VAE with one latent per 32 x 32 pixels."""
    tokenizer = build_chat_tokenizer()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=build_language_model("Gemma2", tokenizer),
        vae=build_dc_vae(_DC_CHANNELS),
        transformer=_build_sana_transformer(guidance_embeds=False),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )


def build_sana_sprint() -> SanaSprintPipeline:
    """Sana Sprint: distilled to few steps; its scheduler draws noise."""
    parts = build_sana().components
    return SanaSprintPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        transformer=_build_sana_transformer(guidance_embeds=True),
        scheduler=SCMScheduler(),
    )


def _build_sana_transformer(guidance_embeds: bool) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=_DC_CHANNELS,
        out_channels=_DC_CHANNELS,
        num_layers=_NUM_BLOCKS,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=TEXT_WIDTH,
        sample_size=4,
        guidance_embeds=guidance_embeds,
        **HEADS,
    )


def build_prx() -> PRXPipeline:
    """PRX: Gemma 2 as text encoder; every text is padded to the tokenizer's length."""
    tokenizer = build_chat_tokenizer()
    tokenizer.model_max_length = 64
    return PRXPipeline(
        transformer=PRXTransformer2DModel(
            in_channels=16,
            patch_size=2,
            context_in_dim=TEXT_WIDTH,
            hidden_size=128,
            num_heads=4,
            depth=_NUM_BLOCKS,
            axes_dim=[16, 16],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=build_language_model("Gemma2", tokenizer),
        tokenizer=tokenizer,
        vae=build_flux_vae(),
    )


def build_cogview4() -> CogView4Pipeline:
    """CogView 4: GLM as text encoder; images up to 256 px."""
    tokenizer = build_chat_tokenizer(marks_start=True)
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=build_language_model("Glm", tokenizer),
        vae=build_sd_vae(),
        transformer=CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=_NUM_BLOCKS,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=64,
            condition_dim=16,
            pos_embed_max_size=16,
            sample_size=LATENT_SIZE,
            rope_axes_dim=(16, 16),
            **HEADS,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    )
