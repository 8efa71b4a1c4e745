"""Warnings of text that is cut off before an encoder reads it, for any pipeline."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from deployments.answers import Encoded
from deployments.request import GenerationRequest, Prompt
from deployments.stages.encode import TextEncoding
from deployments.stages.tensors import each_tensor
from deployments.stages.texts.truncation import Reading, TokenizerWatch, truncation_warnings
from tests.deployments.stages.texts.test_encoder_forwards import READING, load

QUICK = ("flux", "sd35", "qwen-image", "wan")
"""Checkpoints tested without --thorough."""
WORDS = "a tin robot and a paper moon under an old oak by the sea, "


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        metafunc.parametrize("family", [name for name in READING if is_thorough or name in QUICK])


def asking(request: GenerationRequest, text: str, negative: str = "blurry") -> GenerationRequest:
    return replace(request, prompt=Prompt(text, negative, is_guided=True))


def encoded(stage: TextEncoding, request: GenerationRequest) -> Encoded:
    [outcome] = stage.encode_together([(request, None)])
    assert isinstance(outcome, Encoded)
    return outcome


def same(one: Encoded, other: Encoded) -> bool:
    tensors = [list(each_tensor(each.encodings)) for each in (one, other)]
    shapes = [[tensor.shape for tensor in each] for each in tensors]
    return shapes[0] == shapes[1] and all(map(torch.equal, *tensors))


@pytest.mark.slow
def test_a_last_word_that_changes_nothing_is_told_and_one_that_somebody_reads_is_not(family: str) -> None:
    """Two texts that differ only in the last word show whether it is read, without a known limit, template or
    tokenizer."""
    stage, request = load(family, cache_mib=0, max_sequence_length=96)
    for num in (1, 12, 120):
        one, other = (encoded(stage, asking(request, WORDS * num + word)) for word in ("zebra", "wagon"))
        is_lost = same(one, other)
        assert bool(one.warnings) >= is_lost, num
        assert all(warning.endswith("reads all") != is_lost for warning in one.warnings), (num, one.warnings)
        if is_lost:
            break


@pytest.mark.slow
def test_without_what_was_cut_off_the_text_is_the_same() -> None:
    stage, request = load("sd15")
    text = "a b c d e " * 20 + "zebra"  # a token for each word, so that the cut is between two words
    long = encoded(stage, asking(request, text))
    [warning] = long.warnings
    begin, tail, _ = warning.split('"')
    assert begin.startswith("prompt: CLIP reads 77 tokens; ")
    tail = tail.removesuffix("…")
    short = encoded(stage, asking(request, " ".join(text.split()[:75])))
    assert text.split()[75:][: len(tail.split()) - 1] == tail.split()[:-1]
    assert short.warnings == ()
    assert same(long, short)


@pytest.mark.slow
def test_each_field_is_told_by_its_name() -> None:
    stage, request = load("sd15")
    told = encoded(stage, asking(request, "a cat", "blurry " * 100)).warnings
    assert [warning.partition(":")[0] for warning in told] == ["negative_prompt"]
    told = encoded(stage, asking(request, WORDS * 9, "blurry " * 100)).warnings
    assert [warning.partition(":")[0] for warning in told] == ["prompt", "negative_prompt"]


@pytest.mark.slow
def test_it_is_told_again_of_what_was_kept() -> None:
    stage, request = load("sd15")
    asked = asking(request, WORDS * 9)
    first = encoded(stage, asked)
    recalled = stage.recall(asked)
    assert recalled is not None
    assert recalled.warnings == first.warnings != ()
    assert encoded(stage, asked).warnings == first.warnings


@pytest.mark.slow
def test_prompts_that_wait_are_each_told_of_their_own() -> None:
    stage, request = load("sd15", cache_mib=0)
    texts = ["a cat", WORDS * 2 + "zebra", "a dog", WORDS * 2 + "wagon", WORDS * 2 + "zebra"]
    made: list[Any] = stage.encode_together([(asking(request, text), None) for text in texts])
    assert [len(each.warnings) for each in made] == [0, 1, 0, 1, 1]
    assert "zebra" in made[1].warnings[0]
    assert "wagon" in made[3].warnings[0]
    assert made[4].warnings == made[1].warnings


@pytest.mark.slow
def test_who_reads_all_of_it_is_told_too() -> None:
    stage, request = load("flux", max_sequence_length=512)
    [warning] = encoded(stage, asking(request, WORDS * 8 + "zebra")).warnings
    assert warning.startswith("prompt: CLIP reads 77 tokens, not the last ")
    assert warning.endswith("; T5 reads all")


def test_a_tokenizer_in_python_that_does_not_tell_is_asked_once_more() -> None:
    """The tokenizer is that of ByT5, whose tokens are bytes."""
    prompt, part = Prompt("a red cat and a blue dog", None, is_guided=False), ByT5Tokenizer()
    pipe = SimpleNamespace(components={"tokenizer": part}, tokenizer=part, text_encoder=None)
    watch = TokenizerWatch(pipe, prompt)
    made = watch.components["tokenizer"]([prompt.text], truncation=True, max_length=14)
    assert made["input_ids"][0] == part([prompt.text], truncation=True, max_length=14)["input_ids"][0]
    assert truncation_warnings(prompt, watch.take({}, ())) == (
        'prompt: ByT5 reads 14 tokens; 11 more were cut off: "a blue dog"',
    )


def test_what_is_cut_off_of_a_template_is_nobodys_loss() -> None:
    text = "Draw: a cat. As you are told."
    spans = [(6, 7), (8, 11), (11, 12), (13, 15), (16, 19)]
    reading = Reading("Qwen", text, 3, tuple(spans[:3]), tuple(spans[3:]))
    assert truncation_warnings(Prompt("a cat.", None, is_guided=False), [reading]) == ()
    longer = Prompt("a cat. As you are", None, is_guided=False)
    assert truncation_warnings(longer, [reading]) == (
        'prompt: Qwen reads 3 tokens; 2 more were cut off: "As you"',
    )


def test_a_text_that_is_both_prompts_is_told_once() -> None:
    reading = Reading("CLIP", "a b", 1, ((0, 1),), ((2, 3),))
    both = Prompt("a b", "a b", is_guided=True)
    assert truncation_warnings(both, [reading, reading]) == (
        'prompt: CLIP reads 1 tokens; 1 more were cut off: "b"',
    )


def test_a_very_long_tail_is_quoted_in_part() -> None:
    text = "a " + "word " * 500
    reading = Reading("CLIP", text, 1, ((0, 1),), ((2, len(text)),))
    [warning] = truncation_warnings(Prompt(text, None, is_guided=False), [reading])
    assert len(warning) < 200
    assert warning.endswith('…"')
