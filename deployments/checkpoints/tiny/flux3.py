"""Tiny pipelines of FLUX.3, which diffusers has only as a modular pipeline."""

from diffusers import (
    Flux3AutoBlocks,
    Flux3DistilledAutoBlocks,
    Flux3Transformer2DModel,
    ModularPipeline,
    SequentialPipelineBlocks,
)
from transformers import Qwen3VLForConditionalGeneration

from deployments.checkpoints.tiny.language import build_chat_tokenizer, build_qwen3_vl
from deployments.checkpoints.tiny.sizes import HEADS
from deployments.checkpoints.tiny.text import TEXT_WIDTH
from deployments.checkpoints.tiny.vaes import build_flux2_vae
from deployments.checkpoints.tiny.vision import build_qwen3_processor

_STACKED_LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)
"""Layers of the text encoder whose output states FLUX.3 reads."""
_IN_CHANNELS = 64
"""The VAE's 16 channels, packed by 2 x 2."""


def build_flux3() -> ModularPipeline:
    """FLUX.3, with classifier-free guidance."""
    return _build(Flux3AutoBlocks(), flow_map=False)


def build_flux3_distilled() -> ModularPipeline:
    """FLUX.3 klein: each step also gets the time that it jumps to, and there is no guidance."""
    return _build(Flux3DistilledAutoBlocks(), flow_map=True)


def _build(blocks: SequentialPipelineBlocks, *, flow_map: bool) -> ModularPipeline:
    """Builds a pipeline without the language model that rewrites prompts."""
    tokenizer, pipeline = build_chat_tokenizer(), blocks.init_pipeline()
    language_model = build_qwen3_vl(tokenizer, num_layers=_STACKED_LAYERS[-1])
    pipeline.update_components(
        text_encoder=Qwen3VLForConditionalGeneration(language_model.config),
        tokenizer=build_qwen3_processor(tokenizer),
        vae=build_flux2_vae(),
        transformer=Flux3Transformer2DModel(
            in_channels=_IN_CHANNELS,
            cond_in_channels=_IN_CHANNELS,
            num_layers=2,
            num_single_layers=4,
            joint_attention_dim=len(_STACKED_LAYERS) * TEXT_WIDTH,
            timestep_channels=64,
            axes_dims_rope=(8, 8, 8, 8),
            flow_map=flow_map,
            **HEADS,
        ),
    )
    return pipeline
