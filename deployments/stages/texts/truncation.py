"""Finds what encoders do not read of a text, by watching the tokenizers that the pipeline's own code calls.

So pipelines need not be listed by name: whatever a pipeline calls, and whatever limit it sets, its tokenizers show
where a text is cut.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from deployments.request import Prompt
from deployments.stages.tensors import each_tensor

Span = tuple[int, int]
"""A range of characters in a text: start, end."""

_ENDS = re.compile(r"(Text|Encoder|Model|For[A-Z]|Tokenizer|Processor).*")
"""What follows the name of the architecture in a class's name."""
MAX_QUOTED = 80


@dataclass(frozen=True)
class Reading:
    """One text, as one text encoder gets it. Each token is given as its span in the text."""

    encoder: str
    """The encoder's architecture, such as CLIP."""
    text: str
    limit: int | None
    """Most tokens that the encoder reads."""
    tokens: tuple[Span, ...]
    cut: tuple[Span, ...] = ()


class TokenizerWatch:
    """Watches the tokenizers during one request's pipeline call."""

    def __init__(self, pipe: Any, prompt: Prompt) -> None:
        self._prompt = prompt
        self._readings: list[Reading] = []
        self.components = dict(self._watched(pipe))
        """Watched copies of the pipeline's tokenizers, and of processors that have one, by component name."""

    def _watched(self, pipe: Any) -> Iterator[tuple[str, Any]]:
        for name, part in pipe.components.items():
            if part is None or not name.startswith(("tokenizer", "processor")):
                continue
            encoder = _architecture(pipe, name)
            if hasattr(part, "tokenizer"):
                processor = _twin(part)
                vars(processor)["tokenizer"] = self._watch(part.tokenizer, encoder)
                yield name, processor
            elif hasattr(part, "_encode_plus"):
                yield name, self._watch(part, encoder)

    def _watch(self, tokenizer: Any, encoder: str) -> Any:
        """Returns a watched shallow copy: chat templates and processors call a tokenizer through its methods."""
        watched = _twin(tokenizer)
        vars(watched)["_encode_plus"] = partial(self._encode, watched, encoder)
        return watched

    def _encode(self, tokenizer: Any, encoder: str, *args: Any, **kwargs: Any) -> Any:
        ask = type(tokenizer)._encode_plus
        made = ask(tokenizer, *args, **kwargs)
        text, strategy = kwargs.get("text"), kwargs.get("truncation_strategy")
        is_cutting = getattr(strategy, "value", "do_not_truncate") != "do_not_truncate"
        limit = kwargs.get("max_length") if is_cutting else None
        texts = [text] if isinstance(text, str) else text if isinstance(text, list) else []
        if (encodings := getattr(made, "encodings", None)) is not None:
            pairs = zip(texts, encodings, strict=False)
            self._readings += [_reading(encoder, *pair, limit) for pair in pairs if isinstance(pair[0], str)]
        elif isinstance(text, str) and limit is not None:  # a Python tokenizer reports no cuts
            self._readings.append(_slow_reading(partial(ask, tokenizer), tokenizer, encoder, text, limit))
        return made

    def take(self, arguments: Mapping[str, Any], made: Any) -> tuple[Reading, ...]:
        """Returns what was read since the last call; () if nothing was cut off.

        arguments, made: those of the pipeline's encoding method, and its result. Some methods cut off a text's
        embeddings rather than its tokens.
        """
        readings, self._readings = self._readings, []
        length = arguments.get("max_sequence_length")
        if length is not None and length in [each.shape[1] for each in each_tensor(made) if each.ndim == 3]:
            readings = [self._cut_later(reading, length) for reading in readings]
        by_text: dict[tuple[str, str], Reading] = {}
        for reading in readings:  # most pipelines tokenize the whole text again, to log what is cut off
            known = by_text.get((reading.encoder, reading.text))
            if known is None or len(reading.cut) > len(known.cut):
                by_text[reading.encoder, reading.text] = reading
        kept = tuple(by_text.values())
        return kept if any(reading.cut for reading in kept) else ()

    def _cut_later(self, reading: Reading, length: int) -> Reading:
        """Returns the reading if only the prompt's first `length` embeddings, without the template's, are kept."""
        begin, _ = _place(reading, self._prompt)[1]
        first = next((i for i, (_, end) in enumerate(reading.tokens) if end > begin), 0)
        cut = reading.tokens[first + length :]
        return replace(reading, limit=length, cut=(*cut, *reading.cut)) if cut else reading


def truncation_warnings(prompt: Prompt, readings: Sequence[Reading]) -> tuple[str, ...]:
    """Returns warnings for users: what was cut off in which field, and which encoders read all of it."""
    told: dict[str, None] = {}
    for field in ("prompt", "negative_prompt"):
        placed = [(reading, *_place(reading, prompt)) for reading in readings]
        of = [(reading, _within(reading.cut, where)) for reading, its, where in placed if its == field]
        whole = {reading.encoder for reading, cut in of if not cut}
        for reading, cut in of:
            if not cut:
                continue
            begin, end = min(begin for begin, _ in cut), max(end for _, end in cut)
            text, who = (
                _quoted(reading.text[begin:end]),
                f"{field}: {reading.encoder} reads {reading.limit} tokens",
            )
            if others := sorted(whole - {reading.encoder}):
                told[f"{who}, not the last {len(cut)}: {text}; {' and '.join(others)} reads all"] = None
            else:
                told[f"{who}; {len(cut)} more were cut off: {text}"] = None
    return tuple(told)


def _reading(encoder: str, text: str, encoding: Any, limit: int | None) -> Reading:
    """Returns the reading of a fast tokenizer's encoding."""
    cut = [span for piece in encoding.overflowing for span in _spans(piece)]
    return Reading(encoder, text, limit, tuple(_spans(encoding, with_special=True)), tuple(cut))


def _spans(encoding: Any, *, with_special: bool = False) -> list[Span]:
    """Returns the spans of all tokens but padding and, unless `with_special`, special tokens."""
    each = zip(encoding.offsets, encoding.attention_mask, encoding.special_tokens_mask, strict=True)
    return [span for span, is_there, is_special in each if is_there and (with_special or not is_special)]


def _slow_reading(ask: Any, tokenizer: Any, encoder: str, text: str, limit: int) -> Reading:
    """Returns the reading of a slow tokenizer: tokenizes the whole text again, and finds the cut in the text by
    decoding what is cut off."""
    ids = ask(text=text, add_special_tokens=False, verbose=False)["input_ids"]
    num_cut = len(ids) + tokenizer.num_special_tokens_to_add() - limit
    if num_cut <= 0:
        return Reading(encoder, text, limit, ())
    found = text.rfind(tokenizer.decode(ids[-num_cut:], skip_special_tokens=True).strip())
    begin = found if found >= 0 else len(text) * (len(ids) - num_cut) // len(ids)
    return Reading(encoder, text, limit, (), ((begin, len(text)),) * num_cut)


def _place(reading: Reading, prompt: Prompt) -> tuple[str, Span]:
    """Returns which field was read, and where its text is in what was read: pipelines put texts into templates,
    trim them and make them lower case."""
    found: list[tuple[int, str, Span]] = []
    for field, text in (("prompt", prompt.text), ("negative_prompt", prompt.negative_text or "")):
        trimmed = " ".join(text.split())
        for form in (text, text.strip(), trimmed, trimmed.lower(), text.strip().lower()):
            begin = reading.text.find(form) if form else -1
            if begin >= 0:
                found.append((len(form), field, (begin, begin + len(form))))
                break
    if not found:
        return "prompt", (0, len(reading.text))
    _, field, where = max(found, key=lambda each: each[0])
    return field, where


def _within(spans: Sequence[Span], where: Span) -> list[Span]:
    return [(begin, end) for begin, end in spans if begin < where[1] and end > where[0]]


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return f'"{text}"' if len(text) <= MAX_QUOTED else f'"{text[:MAX_QUOTED]}…"'


def _architecture(pipe: Any, name: str) -> str:
    """Returns the architecture of the text encoder that reads the output of this tokenizer or processor."""
    model = getattr(pipe, re.sub("^(tokenizer|processor)", "text_encoder", name), None)
    of = type(getattr(pipe, name) if model is None else model).__name__
    return _ENDS.sub("", of) or of


def _twin(part: Any) -> Any:
    """Returns a shallow copy, without calling the class's own methods for construction or copying."""
    twin = object.__new__(type(part))
    vars(twin).update(vars(part))
    return twin
