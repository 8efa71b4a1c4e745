"""Tokenizers built in memory, and tiny text encoders whose vocabulary fits them.

One character of a prompt is one token, so no vocabulary file is needed and every ASCII prompt can be encoded.
Widths are multiples of 64, the block size of bitsandbytes' 4-bit weights.
"""

import re
import string
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_WIDTH = 64
"""Default hidden width of a tiny text encoder, and width of the CLIP projections."""

_CLIP_MAX_LENGTH = 77
_QWEN_SPECIAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_pad|>",
]
_QWEN_TEMPLATE = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n"
)


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level tokenizer of 514 tokens: 256 bytes inside a word, 256 at its end, start and end of text."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{char}</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=_CLIP_MAX_LENGTH, pad_token="<|endoftext|>")


def build_t5_tokenizer() -> T5Tokenizer:
    """Unigram tokenizer over printable ASCII; other characters become `<unk>`. UMT5 reads it as well."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    characters = [(char, -3.0) for char in string.printable.strip()]
    return T5Tokenizer(vocab=special + characters, extra_ids=0, model_max_length=512)


def build_qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level tokenizer, with one token per marker of Qwen2.5-VL and per word of the template.

    The pipeline drops the first 34 tokens, which are the template's. If the template were encoded byte by byte, a
    hundred of its tokens would stay and dominate the prompt.
    """
    vocab = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": _QWEN_SPECIAL_TOKENS})
    tokenizer.add_tokens(re.findall(r" ?\w+", _QWEN_TEMPLATE))
    return tokenizer


def build_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP-L: its pooled output is the hidden state at the tokenizer's end-of-text token."""
    return CLIPTextModel(_clip_config(tokenizer, hidden_act="quick_gelu"))


def build_projected_clip_encoder(
    tokenizer: CLIPTokenizer, hidden_act: str = "gelu", num_positions: int = _CLIP_MAX_LENGTH
) -> CLIPTextModelWithProjection:
    """A small CLIP with a text projection: OpenCLIP-G (`gelu`), or SD3's CLIP-L (`quick_gelu`)."""
    return CLIPTextModelWithProjection(_clip_config(tokenizer, hidden_act, num_positions))


def build_t5_encoder(tokenizer: T5Tokenizer, width: int = TEXT_WIDTH) -> T5EncoderModel:
    """A small T5-XXL encoder; its output is `[B, S, width]`."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def build_t5() -> dict[str, Any]:
    """T5's tokenizer and encoder, under the component names of pipelines with one text encoder."""
    tokenizer = build_t5_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": build_t5_encoder(tokenizer)}


def build_umt5_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """A small UMT5-XXL encoder: like T5, but every layer has its own relative position bias."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def build_qwen_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A small Qwen2.5-VL with its vision tower, which image editing needs."""
    token_id = {token: tokenizer.convert_tokens_to_ids(token) for token in _QWEN_SPECIAL_TOKENS}
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1_000_000.0},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": token_id["<|im_end|>"],
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {
        "depth": 2,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        vision_start_token_id=token_id["<|vision_start|>"],
        vision_end_token_id=token_id["<|vision_end|>"],
        image_token_id=token_id["<|image_pad|>"],
        video_token_id=token_id["<|video_pad|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _clip_config(
    tokenizer: CLIPTokenizer, hidden_act: str, num_positions: int = _CLIP_MAX_LENGTH
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=num_positions,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act=hidden_act,
    )
