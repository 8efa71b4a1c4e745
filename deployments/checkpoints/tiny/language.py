"""Tiny language models as text encoders, for the byte-level tokenizer of `text`."""

from typing import Any

import transformers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    CLIPTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from deployments.checkpoints.tiny.sizes import VISION
from deployments.checkpoints.tiny.text import TEXT_WIDTH, build_qwen_tokenizer

_CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_MAX_LENGTH = 4096


def build_chat_tokenizer(*, marks_start: bool = False) -> Qwen2Tokenizer:
    """Builds a tokenizer whose chat template is Qwen's, without a default system message.

    marks_start: every text begins with a start token, as Gemma's and GLM's do, so an empty text has one token.
    """
    tokenizer = build_qwen_tokenizer()
    tokenizer.chat_template = _CHAT
    if marks_start:
        start = tokenizer.pad_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.pad_token_id)]
        )
    return tokenizer


def build_language_model(
    kind: str, tokenizer: Qwen2Tokenizer, *, suffix: str = "Model", num_layers: int = 3, **config: Any
) -> PreTrainedModel:
    """Builds a model of the class `kind` + `suffix`: Qwen3, Llama, SmolLM3, Gemma, Gemma2 or Glm; Model or
    ForCausalLM."""
    model_config = getattr(transformers, f"{kind}Config")(
        **_language(tokenizer, num_layers)
        | {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 1}
        | config
    )
    model: PreTrainedModel = getattr(transformers, f"{kind}{suffix}")(model_config)
    return model


def build_byt5() -> tuple[ByT5Tokenizer, T5EncoderModel]:
    """ByT5, which reads the text that an image is to show byte by byte."""
    config = T5Config(vocab_size=1510, d_model=TEXT_WIDTH, d_kv=16, d_ff=TEXT_WIDTH, num_layers=2, num_heads=4)
    return ByT5Tokenizer(), T5EncoderModel(config)


def build_mistral3(tokenizer: Qwen2Tokenizer, suffix: str) -> PreTrainedModel:
    """Mistral Small 3 with its vision tower; 30 layers, so that those exist whose states FLUX.2 reads. suffix:
    Model or ForConditionalGeneration."""
    config = Mistral3Config(
        text_config={"model_type": "mistral"} | _language(tokenizer, 30),
        vision_config={"model_type": "pixtral"} | VISION,
        image_token_index=5,
    )
    model: PreTrainedModel = getattr(transformers, f"Mistral3{suffix}")(config)
    return model


def build_gemma3(tokenizer: Qwen2Tokenizer) -> Gemma3ForConditionalGeneration:
    """Gemma 3 with its vision tower; 2 layers, so 3 hidden states."""
    config = Gemma3Config(
        text_config=_language(tokenizer, 2), vision_config=VISION, mm_tokens_per_image=4, image_token_index=5
    )
    return Gemma3ForConditionalGeneration(config)


def build_qwen3_vl(tokenizer: Qwen2Tokenizer, num_layers: int = 3) -> Qwen3VLModel:
    """Qwen3-VL with its vision tower."""
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    vision_config = {
        "depth": 1,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "deepstack_visual_indexes": [0],
    }
    text_config = _language(tokenizer, num_layers) | {"rope_parameters": rope}
    return Qwen3VLModel(Qwen3VLConfig(text_config=text_config, vision_config=vision_config))


def build_bert(tokenizer: CLIPTokenizer) -> BertModel:
    """The bilingual CLIP of HunyuanDiT, which is a BERT."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=TEXT_WIDTH,
    )
    return BertModel(config)


def _language(tokenizer: Qwen2Tokenizer, num_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": _MAX_LENGTH,
    }
