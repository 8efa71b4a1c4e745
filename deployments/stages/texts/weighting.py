"""Prompts of any length with weighted words, for CLIP: encoded by compel.

compel makes the embeddings that users of diffusers pass to a pipeline in place of a prompt. Here the pipeline's
own `encode_prompt` gets them in the same way, so the stages treat the call like any other.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from deployments.errors import CannotServe, WrongField, describe_cause
from deployments.stages.texts.encoding_methods import Method

_READERS: Mapping[tuple[str, ...], str] = {
    ("CLIPTextModel",): "CompelForSD",
    ("CLIPTextModel", "CLIPTextModelWithProjection"): "CompelForSDXL",
}
"""compel's classes by the classes of a pipeline's text encoders."""
_TEXTS = {"prompt", "prompt_2", "negative_prompt", "negative_prompt_2"}
_WEIGHT = re.compile(r":\s*(\d*\.?\d+)\s*$")


class PromptWeighting:
    """Encodes weighted prompts for one checkpoint."""

    def __init__(self, pipe: Any, device: Any) -> None:
        """Raises CannotServe if the pipeline has other encoders than CLIP, or compel is not installed."""
        names = sorted(name for name, part in pipe.components.items() if name.startswith("text_encoder") and part)
        classes = tuple(type(getattr(pipe, name)).__name__ for name in names)
        if classes not in _READERS:
            raise CannotServe(
                f"model.prompt_weighting is for pipelines that read only with CLIP; {type(pipe).__name__} reads "
                f"with {', '.join(classes) or 'nothing'}: leave it out"
            )
        try:
            # Imported only if configured, because few need it.
            compel = importlib.import_module("compel")
        except ImportError as error:
            raise CannotServe(
                f"model.prompt_weighting: {describe_cause(error)}: pip install 'latent-relay[weighting]'"
            ) from error
        self._reader: Callable[..., Any] = getattr(compel, _READERS[classes])
        self._parse: Callable[[str], Any] = compel.Compel.parse_prompt_string
        self._device = str(device)

    def weighed(self, encode_prompt: Method) -> Method:
        """Wraps `encode_prompt`, a method of a pipeline's copy, so that it gets embeddings in place of texts."""
        pipe: Any = encode_prompt.__self__  # type: ignore[attr-defined]

        def encode(*args: Any, **kwargs: Any) -> Any:
            asked = signature(encode_prompt).bind(*args, **kwargs).arguments
            is_guided = bool(asked.get("do_classifier_free_guidance", True))
            negative = asked.get("negative_prompt") if is_guided else None
            if is_guided and negative is None and not pipe.config.get("force_zeros_for_empty_prompt"):
                negative = ""
            made = self._read(pipe, asked["prompt"], negative)
            embeds = {
                "prompt_embeds": made.embeds,
                "pooled_prompt_embeds": made.pooled_embeds,
                "negative_prompt_embeds": made.negative_embeds,
                "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
            }
            given = {name: value for name, value in embeds.items() if value is not None}
            return encode_prompt(**asked | dict.fromkeys(asked.keys() & _TEXTS) | given)

        return encode

    def _read(self, pipe: Any, prompt: str, negative: str | None) -> Any:
        text = self._written("prompt", prompt)
        other = None if negative is None else self._written("negative_prompt", negative)
        try:
            return self._reader(pipe, device=self._device)(text, negative_prompt=other)
        except (AssertionError, LookupError) as error:  # for brackets around nothing
            raise _unreadable("prompt", error) from error

    def _written(self, field: str, text: str) -> str:
        """Returns the text in compel's syntax. Raises WrongField if it cannot be parsed."""
        text = as_compel_writes(text)
        try:
            self._parse(text)
        except Exception as error:  # parsers may raise anything
            raise _unreadable(field, error) from error
        return text


def _unreadable(field: str, error: Exception) -> WrongField:
    return WrongField(
        f"{field}: its weights cannot be read ({describe_cause(error)}): write (words)1.3, word++ or word--, and "
        "\\( or \\) for a bracket of the text, or set prompt_weighting: false",
        field,
    )


def as_compel_writes(text: str) -> str:
    """Rewrites (words:1.3), the syntax of other programs, as (words)1.3."""
    out, opened, previous = list[str](), list[int](), ""
    for character in text:
        if character == "(" and previous != "\\":
            opened.append(len(out))
        if character == ")" and previous != "\\" and opened:
            begin = opened.pop()
            inner = "".join(out[begin:])
            if match := _WEIGHT.search(inner):
                out[begin:] = [inner[: match.start()], f"){match[1]}"]
                previous = character
                continue
        out.append(character)
        previous = character
    return "".join(out)
