"""Text models without weights or words: what a pipeline's own encoding makes of them has the real shapes.

The denoise stage has no text encoders; what it tries, warms up and foresees needs inputs for its denoiser all the
same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from deployments.checkpoints.components import ModelIndex, component_names
from deployments.checkpoints.json_file import read_json

LEAST_TOKENS = 8
"""Of a text where nothing says how long it is padded or cut to."""
_CLIP_TOKENS = 77
"""`model_max_length` of CLIP's tokenizers, which all published pipelines have."""


class BlankTexts:
    """The tokenizers and text encoders of a checkpoint, without what they know."""

    def __init__(self, folder: Path, index: ModelIndex, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._tokenizers: dict[str, Any] = {}
        self._encoders: dict[str, tuple[str, Any]] = {}
        for name in component_names(index):
            if name.startswith("tokenizer"):
                self._tokenizers[name] = BlankTokenizer(folder / name)
            elif name.startswith("text_encoder"):
                config = AutoConfig.from_pretrained(folder / name, local_files_only=True)
                self._encoders[name] = index[name][1], config

    def on(self, device: torch.device) -> dict[str, Any]:
        """By component name, for one call of the pipeline there."""
        encoders = {
            name: BlankTextEncoder(class_name, config, device=device, dtype=self._dtype)
            for name, (class_name, config) in self._encoders.items()
        }
        return self._tokenizers | encoders


class BlankTokenizer:
    """Every text is as long as the call lets it be."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        config = read_json(file) if file.is_file() else {}
        self.model_max_length: int = config.get("model_max_length", _CLIP_TOKENS)

    def __call__(self, text: str | list[str], *_: Any, max_length: int | None = None, **__: Any) -> "BlankTokens":
        """[len(text), max_length] token ids, all zero, and a mask without padding."""
        num_texts = 1 if isinstance(text, str) else len(text)
        ids = torch.zeros(num_texts, max_length or LEAST_TOKENS, dtype=torch.long)
        return BlankTokens(input_ids=ids, attention_mask=torch.ones_like(ids))

    def tokenize(self, _text: str) -> list[str]:
        """For pipelines that look for the tokens of textual inversions."""
        return []

    def batch_decode(self, ids: torch.Tensor, *_: Any, **__: Any) -> list[str]:
        """For pipelines that warn of what they cut off."""
        return [""] * len(ids)

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        return ""


class BlankTokens(dict[str, torch.Tensor]):
    """As transformers' BatchEncoding."""

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, device: torch.device) -> "BlankTokens":
        return BlankTokens({name: value.to(device) for name, value in self.items()})


class BlankTextEncoder(nn.Module):
    """Zeros, in the shapes that its config tells."""

    def __init__(self, class_name: str, config: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.device, self.dtype = config, device, dtype
        self._is_projected = class_name.endswith("WithProjection")
        self.language_model = BlankLanguageModel(config.get_text_config(), dtype)

    def forward(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> "BlankOutput":
        batch, length = input_ids.shape
        text = self.config.get_text_config()
        hidden = torch.zeros(batch, length, text.hidden_size, dtype=self.dtype, device=input_ids.device)
        outputs = {"last_hidden_state": hidden, "hidden_states": (hidden,) * (text.num_hidden_layers + 1)}
        if self._is_projected:
            return BlankOutput({"text_embeds": hidden.new_zeros(batch, text.projection_dim), **outputs})
        return BlankOutput(outputs | {"pooler_output": hidden.new_zeros(batch, text.hidden_size)})


class BlankLanguageModel:
    """For pipelines that call a text encoder layer by layer."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config, self._dtype = config, dtype
        self.layers = [_pass_through] * getattr(config, "num_hidden_layers", 0)

    def embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, S, D]"""
        return torch.zeros(*input_ids.shape, self.config.hidden_size, dtype=self._dtype, device=input_ids.device)

    def rotary_emb(self, *_: Any) -> None:
        """Nobody reads positions here."""


def _pass_through(hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    return hidden_states


class BlankOutput:
    """As transformers' ModelOutput: by name, or by place."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getitem__(self, place: int) -> Any:
        return list(self.__dict__.values())[place]
