"""Tokenizers for the vocabulary of `wording`, and small text encoders for them."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from deployments.training.shapes.wording import vocabulary

TEXT_WIDTH = 128
"""Width of the T5 sequence embeddings and of the CLIP pooled embedding."""
MAX_SEQUENCE_LENGTH = 32
"""Number of T5 tokens that training pads to; the longest sentence of two shapes has 27."""

_FF_WIDTH = 256
_SLOPES = (1.0, 1.0, 0.3, 0.3)
_NEVER = -6.0
_HEAD_DIM = 32
_CLIP_MAX_LENGTH = 77


def build_t5_tokenizer() -> T5Tokenizer:
    """One token per word in lower, Title and UPPER case and per punctuation mark; anything else becomes `<unk>`.

    All three cases are needed, because a loaded `T5Tokenizer` drops a normalizer that would convert to lower case.
    """
    words = vocabulary()
    cased = sorted({f"▁{form}" for word in words for form in (word, word.capitalize(), word.upper())})
    marks = [word for word in words if not word.isalpha()]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [*((word, -2.0) for word in cased), *((mark, -1.0) for mark in marks)]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=512)


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair tokenizer whose merges make one token of each known word; other words are split."""
    alphabet = sorted(ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(vocabulary(), trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    base = [*alphabet, *(f"{char}</w>" for char in alphabet)]
    tokens = dict.fromkeys([*base, *("".join(merge) for merge in merges), "<|startoftext|>", "<|endoftext|>"])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=_CLIP_MAX_LENGTH, pad_token="<|endoftext|>")


def build_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Builds an encoder from `[B, S]` token ids to `[B, S, TEXT_WIDTH]`."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=_HEAD_DIM,
        d_ff=_FF_WIDTH,
        num_layers=3,
        num_heads=TEXT_WIDTH // _HEAD_DIM,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    encoder = T5EncoderModel(config)
    _look_around(encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    return encoder


@torch.no_grad()
def _look_around(bias: Tensor) -> None:
    """Makes two heads attend to near words on the left at first, and two on the right (ALiBi, arXiv 2108.12409).

    `bias` is `[buckets, heads]`: half of the buckets are distances to the left, half to the right. T5's own
    initial bias hardly encodes word order, and learning which words belong together then takes long.
    """
    distances = torch.arange(len(bias) // 2, dtype=bias.dtype)
    far = torch.full_like(distances, _NEVER)
    for head, slope in enumerate(_SLOPES):
        sides = (-slope * distances, far) if head % 2 else (far, -slope * distances)
        bias[:, head] = torch.cat(sides)


def build_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds an encoder whose pooled output `[B, TEXT_WIDTH]` is the hidden state at the end-of-text token."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=_FF_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=TEXT_WIDTH // _HEAD_DIM,
        max_position_embeddings=_CLIP_MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
