"""Prompts whose words weigh, and that may be as long as they like, for CLIP: encoded by compel.

It makes the embeddings that users of diffusers pass to a pipeline in place of a prompt. Here the pipeline's own
`encode_prompt` gets them so, and what the stages do of its call is the same.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from deployments.refusal import CannotServe, WrongField, describe_cause
from deployments.stages.encoding_methods import Method

_READERS: Mapping[tuple[str, ...], str] = {
    ("CLIPTextModel",): "CompelForSD",
    ("CLIPTextModel", "CLIPTextModelWithProjection"): "CompelForSDXL",
}
"""By the classes of a pipeline's text encoders: what of compel reads for them."""
_TEXTS = {"prompt", "prompt_2", "negative_prompt", "negative_prompt_2"}
_WEIGHT = re.compile(r":\s*(\d*\.?\d+)\s*$")


class PromptWeighting:
    """Of one checkpoint."""

    def __init__(self, pipe: Any, device: Any) -> None:
        """Raises CannotServe."""
        names = sorted(name for name, part in pipe.components.items() if name.startswith("text_encoder") and part)
        classes = tuple(type(getattr(pipe, name)).__name__ for name in names)
        if classes not in _READERS:
            raise CannotServe(
                f"model.prompt_weighting is for pipelines that read by CLIP alone; {type(pipe).__name__} reads by "
                f"{', '.join(classes) or 'nothing'}: leave it out"
            )
        try:
            # Looked up where it is asked for: few need it.
            compel = importlib.import_module("compel")
        except ImportError as error:
            raise CannotServe(
                f"model.prompt_weighting: {describe_cause(error)}: pip install 'latent-relay[weighting]'"
            ) from error
        self._reader: Callable[..., Any] = getattr(compel, _READERS[classes])
        self._parse: Callable[[str], Any] = compel.Compel.parse_prompt_string
        self._device = str(device)

    def weighed(self, encode_prompt: Method) -> Method:
        """The same method, of a pipeline's copy, which is given embeddings in place of texts."""
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
        except (AssertionError, LookupError) as error:  # of brackets around nothing
            raise _unreadable("prompt", error) from error

    def _written(self, field: str, text: str) -> str:
        """As compel takes it. Raises WrongField."""
        text = as_compel_writes(text)
        try:
            self._parse(text)
        except Exception as error:  # parsers raise what they like
            raise _unreadable(field, error) from error
        return text


def _unreadable(field: str, error: Exception) -> WrongField:
    return WrongField(
        f"{field}: its weights cannot be read ({describe_cause(error)}): write (words)1.3, word++ or word--, and "
        "\\( or \\) for a bracket of the text, or ask with prompt_weighting: false",
        field,
    )


def as_compel_writes(text: str) -> str:
    """(words:1.3), which other programs take, as (words)1.3."""
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
