"""Tiny pipelines of FLUX and similar models: double blocks, then single blocks."""

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLHunyuanImage,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)

from deployments.checkpoints.tiny.families import build_flux, build_qwen_image
from deployments.checkpoints.tiny.language import (
    build_byt5,
    build_chat_tokenizer,
    build_language_model,
    build_mistral3,
)
from deployments.checkpoints.tiny.sizes import HEADS, LATENT_SIZE, ROPE_AXES
from deployments.checkpoints.tiny.text import (
    TEXT_WIDTH,
    build_clip_tokenizer,
    build_projected_clip_encoder,
    build_t5,
    build_t5_encoder,
    build_t5_tokenizer,
    build_umt5_encoder,
)
from deployments.checkpoints.tiny.vaes import (
    build_flux2_vae,
    build_flux_vae,
    build_image_vae,
    build_sd_vae,
    build_wan22_vae,
)
from deployments.checkpoints.tiny.vision import build_qwen_processor

_USER_TEXT = "{% for part in messages[1].content %}{{ part.text }}{% endfor %}"
_TWO_EACH = {"num_layers": 2, "num_single_layers": 2}
_EMPTY_PROMPT = 128_000
"""The token of SmolLM3's vocabulary that Bria Fibo reads if a prompt is empty."""
_NUM_STACKED_LAYERS = 3
"""Number of the language model's hidden states that FLUX.2 concatenates."""


def build_flux_kontext() -> FluxKontextPipeline:
    """FLUX.1 Kontext: FLUX.1's model; the image's tokens follow those of the noise."""
    parts = build_flux().components
    return FluxKontextPipeline(**parts)


def build_flux_fill() -> FluxFillPipeline:
    """FLUX.1 Fill: 64 noise channels, and 320 channels of the masked image's latents and the mask."""
    parts = build_flux().components
    del parts["image_encoder"], parts["feature_extractor"]
    parts["transformer"] = FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=ROPE_AXES,
        **_TWO_EACH,
        **HEADS,
    )
    return FluxFillPipeline(**parts)


def build_flux2() -> Flux2Pipeline:
    """FLUX.2-dev: Mistral Small as text encoder, guidance embedded.

    A tokenizer replaces its processor, Pixtral's, and leaves out the system message.
    """
    tokenizer = build_chat_tokenizer()
    tokenizer.chat_template = _USER_TEXT
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=build_flux2_vae(),
        text_encoder=build_mistral3(tokenizer, "ForConditionalGeneration"),
        tokenizer=tokenizer,
        transformer=_build_flux2_transformer(guidance_embeds=True),
    )


def build_flux2_klein() -> Flux2KleinPipeline:
    """FLUX.2 klein, not distilled: Qwen3 as text encoder, classifier-free guidance."""
    tokenizer = build_chat_tokenizer()
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=build_flux2_vae(),
        text_encoder=build_language_model("Qwen3", tokenizer, suffix="ForCausalLM", num_layers=27),
        tokenizer=tokenizer,
        transformer=_build_flux2_transformer(guidance_embeds=False),
    )


def _build_flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=64,
        joint_attention_dim=_NUM_STACKED_LAYERS * TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 8, 8, 8),
        **_TWO_EACH,
        **HEADS,
    )


def build_chroma() -> ChromaPipeline:
    """Chroma: FLUX.1 without pooled embeddings; one small network computes every modulation."""
    return ChromaPipeline(
        **build_t5(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_flux_vae(),
        transformer=ChromaTransformer2DModel(
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=ROPE_AXES,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
            **_TWO_EACH,
            **HEADS,
        ),
    )


def build_bria() -> BriaPipeline:
    """Bria 3.2: latents of 4 channels, packed."""
    return BriaPipeline(
        **build_t5(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_image_vae(latent_channels=4, scaling_factor=0.5, shift_factor=0.1),
        transformer=BriaTransformer2DModel(
            in_channels=16,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=list(ROPE_AXES),
            **_TWO_EACH,
            **HEADS,
        ),
    )


def build_bria_fibo() -> BriaFiboPipeline:
    """Bria Fibo: every block reads one layer's states of SmolLM3; Wan 2.2's VAE."""
    tokenizer = build_chat_tokenizer()
    return BriaFiboPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_wan22_vae(),
        text_encoder=build_language_model(
            "SmolLM3", tokenizer, suffix="ForCausalLM", vocab_size=_EMPTY_PROMPT + 1
        ),
        tokenizer=tokenizer,
        transformer=BriaFiboTransformer2DModel(
            in_channels=48,
            joint_attention_dim=2 * TEXT_WIDTH,
            text_encoder_dim=TEXT_WIDTH,
            axes_dims_rope=list(ROPE_AXES),
            **_TWO_EACH,
            **HEADS,
        ),
    )


def build_ovis() -> OvisImagePipeline:
    """Ovis-Image: Qwen3 as text encoder."""
    tokenizer = build_chat_tokenizer()
    return OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=build_flux_vae(),
        text_encoder=build_language_model("Qwen3", tokenizer),
        tokenizer=tokenizer,
        transformer=OvisImageTransformer2DModel(
            joint_attention_dim=TEXT_WIDTH, axes_dims_rope=ROPE_AXES, **_TWO_EACH, **HEADS
        ),
    )


def build_longcat() -> LongCatImagePipeline:
    """LongCat-Image: Qwen2.5-VL as text encoder, and its processor, which rewrites prompts."""
    qwen = build_qwen_image()
    return LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=build_flux_vae(),
        text_encoder=qwen.text_encoder,
        tokenizer=qwen.tokenizer,
        text_processor=build_qwen_processor(qwen.tokenizer),
        transformer=LongCatImageTransformer2DModel(
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=list(ROPE_AXES),
            **_TWO_EACH,
            **HEADS,
        ),
    )


def build_hidream() -> HiDreamImagePipeline:
    """HiDream-I1: two CLIPs, T5 and every layer of Llama as text encoders; mixtures of experts."""
    clip_tokenizers, t5_tokenizer = (build_clip_tokenizer(), build_clip_tokenizer()), build_t5_tokenizer()
    llama_tokenizer = build_chat_tokenizer()
    positions = 128
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_flux_vae(),
        text_encoder=build_projected_clip_encoder(clip_tokenizers[0], num_positions=positions),
        tokenizer=clip_tokenizers[0],
        text_encoder_2=build_projected_clip_encoder(clip_tokenizers[1], num_positions=positions),
        tokenizer_2=clip_tokenizers[1],
        text_encoder_3=build_t5_encoder(t5_tokenizer),
        tokenizer_3=t5_tokenizer,
        text_encoder_4=build_language_model(
            "Llama", llama_tokenizer, suffix="ForCausalLM", attn_implementation="eager"
        ),
        tokenizer_4=llama_tokenizer,
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            caption_channels=[TEXT_WIDTH, TEXT_WIDTH],
            text_emb_dim=2 * TEXT_WIDTH,
            axes_dims_rope=(16, 8, 8),
            max_resolution=(128, 128),
            llama_layers=[0, 1, 2, 2],
            **_TWO_EACH,
            **HEADS,
        ),
    )


def build_aura_flow() -> AuraFlowPipeline:
    """AuraFlow: images up to 128 px."""
    tokenizer = build_t5_tokenizer()
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=build_umt5_encoder(tokenizer),
        vae=build_sd_vae(),
        transformer=AuraFlowTransformer2DModel(
            sample_size=LATENT_SIZE,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=128,
            pos_embed_max_size=64,
            **HEADS,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def build_hunyuan_image() -> HunyuanImagePipeline:
    """HunyuanImage 2.1: Qwen2.5-VL and ByT5 as text encoders, a VAE with one latent per 32 x 32 pixels."""
    qwen, (byt5_tokenizer, byt5) = build_qwen_image(), build_byt5()
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(32,) * 6,
            layers_per_block=1,
            spatial_compression_ratio=32,
            sample_size=64,
            scaling_factor=0.75289,
        ),
        text_encoder=qwen.text_encoder,
        tokenizer=qwen.tokenizer,
        text_encoder_2=byt5,
        tokenizer_2=byt5_tokenizer,
        transformer=HunyuanImageTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_refiner_layers=1,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=TEXT_WIDTH,
            rope_axes_dim=(16, 16),
            **_TWO_EACH,
            **HEADS,
        ),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )
