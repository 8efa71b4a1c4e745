"""Text models without weights or vocabulary, with which a pipeline's own encoding gives tensors of real shapes.

The denoise stage has no text encoders, but its trials, warm-up and estimates need inputs for the denoiser.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from deployments.checkpoints.components import ModelIndex, component_names
from deployments.checkpoints.json_file import read_json
from deployments.checkpoints.packages import import_class
from deployments.engine.blocks import build_skeleton
from deployments.memory.working import META
from deployments.stages.tensors import to_zeros, without_values

PICTURE_TOKENS = 256
"""Tokens of a text with an image in it: more than any template has, because pipelines cut off the template's."""
LEAST_TOKENS = 8
"""Tokens of a text that is not padded or cut to any length."""
_CLIP_TOKENS = 77
"""`model_max_length` of CLIP's tokenizers, which all published pipelines have."""


class BlankTexts:
    """Blank stand-ins for a checkpoint's tokenizers, processors and encoders of texts and images."""

    def __init__(self, folder: Path, index: ModelIndex, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._tokenizers: dict[str, Any] = {}
        self._encoders: dict[str, tuple[str, Any]] = {}
        self._connectors: dict[str, nn.Module] = {}
        for name in component_names(index):
            if name.startswith("tokenizer"):
                self._tokenizers[name] = BlankTokenizer(folder / name)
            elif name in ("processor", "image_processor", "feature_extractor"):
                self._tokenizers[name] = BlankProcessor()
            elif name.startswith("text_encoder") or name == "image_encoder":
                config = AutoConfig.from_pretrained(folder / name, local_files_only=True)
                self._encoders[name] = index[name][1], config
            elif name == "connectors":
                self._connectors[name] = build_skeleton(import_class(index[name]), folder, name)

    def on(self, device: torch.device) -> dict[str, Any]:
        """Returns the stand-ins by component name, for one call of the pipeline on the device."""
        encoders = {
            name: BlankImageEncoder(config, device=device, dtype=self._dtype)
            if name == "image_encoder"
            # All hidden states of LTX-2's text encoder are a GiB, and only its connectors read them.
            else BlankTextEncoder(
                class_name, config, device=device, dtype=self._dtype, has_values=not self._connectors
            )
            for name, (class_name, config) in self._encoders.items()
        }
        connectors = {name: BlankConnectors(skeleton, self._dtype) for name, skeleton in self._connectors.items()}
        return self._tokenizers | encoders | connectors


class BlankTokenizer:
    """A tokenizer for which every text is as long as the call pads it, or LEAST_TOKENS."""

    pad_token, pad_token_id = "", 0

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        config = read_json(file) if file.is_file() else {}
        self.model_max_length: int = config.get("model_max_length", _CLIP_TOKENS)

    def __call__(
        self,
        text: str | list[str],
        *_: Any,
        max_length: int | None = None,
        padding: bool | str = False,
        return_tensors: str | None = None,
        **__: Any,
    ) -> "BlankTokens":
        """Returns zeros as token ids [len(text), max_length] and a mask without padding, as lists or tensors.

        Without padding, max_length is only a limit and not the length: FLUX.3 allows 8192 tokens, and pads to the
        next 80.
        """
        num_texts = 1 if isinstance(text, str) else len(text)
        ids = torch.zeros(num_texts, (padding and max_length) or LEAST_TOKENS, dtype=torch.long)
        if return_tensors is not None:
            return BlankTokens(input_ids=ids, attention_mask=torch.ones_like(ids))
        lists = [ids.tolist(), torch.ones_like(ids).tolist()]
        values = [each[0] for each in lists] if isinstance(text, str) else lists
        return BlankTokens(input_ids=values[0], attention_mask=values[1])

    @property
    def tokenizer(self) -> "BlankTokenizer":
        """The tokenizer itself, because it may also stand for a processor."""
        return self

    def tokenize(self, _text: str) -> list[str]:
        """For pipelines that look for the tokens of textual inversions."""
        return []

    def batch_decode(self, ids: torch.Tensor, *_: Any, **__: Any) -> list[str]:
        """For pipelines that warn of what they cut off."""
        return [""] * len(ids)

    def apply_chat_template(
        self, _messages: Any, *_: Any, tokenize: bool = True, max_length: int | None = None, **__: Any
    ) -> "BlankTokens | str":
        return self([""], max_length=max_length, padding=True, return_tensors="pt") if tokenize else ""

    def pad(self, tokens: Any, *_: Any, max_length: int | None = None, **__: Any) -> "BlankTokens":
        return self([""] * len(tokens["input_ids"]), max_length=max_length, padding=True, return_tensors="pt")

    def encode(self, _text: str, **_: Any) -> list[int]:
        """For pipelines that count the tokens of their own words."""
        return [0] * LEAST_TOKENS


class BlankProcessor:
    """A processor of images, with or without texts."""

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> "BlankTokens":
        num = len(text) if isinstance(text, list) else 1
        if text is None:
            return BlankTokens(pixel_values=torch.zeros(num, 3, 1, 1))
        ids = torch.zeros(num, PICTURE_TOKENS, dtype=torch.long)
        return BlankTokens(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.zeros(num, 3, 1, 1),
            image_grid_thw=torch.ones(num, 3, dtype=torch.long),
        )

    def preprocess(self, images: Any = None, **_: Any) -> "BlankTokens":
        return self(images)

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        return ""


class BlankTokens(dict[str, Any]):
    """Works like transformers' BatchEncoding."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "BlankTokens":
        """Moves all tensors. dtype: for floating point tensors only."""
        return BlankTokens(
            {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in self.items()}
        )


class BlankTextEncoder(nn.Module):
    """A text encoder that returns zeros, in the shapes that its config gives."""

    def __init__(
        self, class_name: str, config: Any, *, device: torch.device, dtype: torch.dtype, has_values: bool
    ) -> None:
        """has_values: False: the zeros are on the meta device."""
        super().__init__()
        self.config, self.device, self.dtype = config, device, dtype
        self._has_values = has_values
        self._is_projected = class_name.endswith("WithProjection")
        self.language_model = BlankLanguageModel(config.get_text_config(), dtype)

    def forward(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> "BlankOutput":
        batch, length = input_ids.shape
        text = self.config.get_text_config()
        device = input_ids.device if self._has_values else META
        hidden = torch.zeros(batch, length, text.hidden_size, dtype=self.dtype, device=device)
        outputs = {"last_hidden_state": hidden, "hidden_states": (hidden,) * (text.num_hidden_layers + 1)}
        if self._is_projected:
            return BlankOutput({"text_embeds": hidden.new_zeros(batch, text.projection_dim), **outputs})
        return BlankOutput(outputs | {"pooler_output": hidden.new_zeros(batch, text.hidden_size)})


class BlankConnectors:
    """Connectors between a text encoder and a denoiser that return zeros, on the device of the text's mask."""

    def __init__(self, skeleton: nn.Module, dtype: torch.dtype) -> None:
        self._skeleton, self._dtype = skeleton, dtype

    def __call__(self, states: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> Any:
        model = copy.deepcopy(self._skeleton).to(META)
        with torch.no_grad():
            made = model(*without_values((states, mask)), **kwargs)
        return to_zeros(made, mask.device, self._dtype)


class BlankImageEncoder(nn.Module):
    """An image encoder that returns zeros, for as many patches as its config gives an image."""

    def __init__(self, config: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.device, self.dtype = config, device, dtype
        self.none = nn.Parameter(
            torch.empty(0, dtype=dtype, device=device)
        )  # for pipelines that read the dtype of its parameters

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> "BlankOutput":
        vision = getattr(self.config, "vision_config", self.config)
        num_patches = (vision.image_size // vision.patch_size) ** 2
        num_patches += "siglip" not in vision.model_type  # CLIP's class token
        shape = (len(pixel_values), num_patches, vision.hidden_size)
        hidden = torch.zeros(shape, dtype=self.dtype, device=pixel_values.device)
        every = (hidden,) * (vision.num_hidden_layers + 1)
        return BlankOutput({"last_hidden_state": hidden, "hidden_states": every, "image_embeds": hidden[:, 0]})


class BlankLanguageModel:
    """For pipelines that call a text encoder layer by layer."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config, self._dtype = config, dtype
        self.layers = [_pass_through] * getattr(config, "num_hidden_layers", 0)

    def embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, S, D]"""
        return torch.zeros(*input_ids.shape, self.config.hidden_size, dtype=self._dtype, device=input_ids.device)

    def rotary_emb(self, *_: Any) -> None:
        """Returns None, because the blank layers read no positions."""


def _pass_through(hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    return hidden_states


class BlankOutput:
    """Works like transformers' ModelOutput: values by name or by index."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getitem__(self, place: int | str) -> Any:
        values = self.__dict__
        return values[place] if isinstance(place, str) else list(values.values())[place]
