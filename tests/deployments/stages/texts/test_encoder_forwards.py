"""Waiting prompts are encoded together, and each gets what it gets alone."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from deployments.answers import Encodings
from deployments.checkpoints.geometry import with_geometry
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.engine.adapters import AdapterLayers
from deployments.request import GenerationRequest, Prompt
from deployments.stages.encode import TextEncoding
from deployments.stages.tensors import each_tensor
from deployments.stages.texts.encoder_forwards import EncoderForward, EncoderForwards
from deployments.stages.warm_up import default_request, tried_size
from tests.deployments.derived_here import with_family_here
from tests.deployments.tiny_calls import TINY_CALLS

TEXTS = ("a cat", "two blue whales under a paper moon, in the manner of an old woodcut", "a red fox", "a dog")
TOLERANCE = 2e-5
READING = [name for name, call in TINY_CALLS.items() if not {"image", "control_image", "video"} & call.keys()]
"""Checkpoints that draw from a text alone."""
QUICK = ("sd35", "qwen-image", "flux3")
"""Checkpoints tested without --thorough: CLIP with T5, a language model, a modular pipeline."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        metafunc.parametrize("family", [name for name in READING if is_thorough or name in QUICK])


def load(family: str, **config: Any) -> tuple[TextEncoding, GenerationRequest]:
    """Returns the encode stage and a guided request for it."""
    model = with_geometry(with_family_here(ModelConfig(name="tiny", checkpoint=f"tiny://{family}")))
    request = default_request(model, tried_size(model.geometry))
    guidance_scale = 3.0 if request.guidance_scale else request.guidance_scale
    return TextEncoding(model, EncoderConfig(**config)), replace(request, guidance_scale=guidance_scale)


def asking(request: GenerationRequest, text: str) -> GenerationRequest:
    return replace(request, prompt=Prompt(text, "blurry", is_guided=True))


def together(stage: TextEncoding, requests: list[GenerationRequest]) -> list[Encodings]:
    outcomes = stage.encode_together([(request, None) for request in requests])
    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert not failed
    return [outcome.encodings for outcome in outcomes if not isinstance(outcome, Exception)]


def num_forwards(stage: TextEncoding) -> int:
    return sum(stage.batch_sizes.values())


def test_prompts_get_together_what_each_gets_alone(family: str) -> None:
    stage, request = load(family, cache_mib=0)
    requests = [asking(request, text) for text in TEXTS]
    alone = [together(stage, [request])[0] for request in requests]
    num_alone = num_forwards(stage)
    for made, expected in zip(together(stage, requests), alone, strict=True):
        assert [name for name, _ in made] == [name for name, _ in expected]
        for one, other in zip(each_tensor(made), each_tensor(expected), strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)
    if family == "ideogram4":  # its pipeline calls single layers of the encoder, which do not merge
        assert num_alone == 0
    else:
        assert num_forwards(stage) - num_alone < num_alone


def test_padded_prompts_share_every_forward() -> None:
    stage, request = load("sd35", cache_mib=0)
    together(stage, [asking(request, text) for text in TEXTS])
    assert dict(stage.batch_sizes) == {
        len(TEXTS): 6
    }  # three encoders, each for the prompt and for the negative prompt


def test_a_prompt_that_comes_several_times_at_once_is_encoded_once_even_without_a_cache() -> None:
    stage, request = load("sd15", cache_mib=0)
    first, *others = together(stage, [asking(request, "a cat")] * 10)
    assert (stage.num_forwards, stage.num_shared, dict(stage.batch_sizes)) == (1, 9, {1: 2})
    assert all(next(each_tensor(other)) is next(each_tensor(first)) for other in others)


def test_what_is_kept_of_a_prompt_is_as_large_as_if_it_came_alone() -> None:
    """A kept tensor is no view of a batch, which would be kept and sent with it."""
    stage, request = load("sd15")
    for made in together(stage, [asking(request, text) for text in TEXTS]):
        for tensor in each_tensor(made):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_prompt_that_no_tokenizer_takes_fails_alone() -> None:
    stage, request = load("sd15")
    requests = [asking(request, text) for text in ("a cat", "\ud800", "a dog")]
    one, failed, other = stage.encode_together([(request, None) for request in requests])
    assert isinstance(failed, TypeError)
    assert [one.encodings, other.encodings] == together(stage, [requests[0], requests[2]])  # cached, as any other
    assert stage.num_forwards == 3


class Encoder(nn.Module):
    """An encoder that returns token ids as hidden states, and raises IndexError for negative ones."""

    def __init__(self, *, is_batch_first: bool = True) -> None:
        super().__init__()
        self._is_batch_first = is_batch_first
        self.num_calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BaseModelOutput:
        self.num_calls += 1
        if (input_ids < 0).any():
            raise IndexError("no such token")
        states = input_ids[..., None].float()
        return BaseModelOutput(states if self._is_batch_first else states.transpose(0, 1))


def forwards(model: nn.Module, *ids: list[int], **inputs: Any) -> list[EncoderForward]:
    return [EncoderForward("text_encoder", model, (torch.tensor([row]),), inputs) for row in ids]


def run(asked: list[EncoderForward]) -> tuple[list[Any], dict[int, int]]:
    runner = EncoderForwards(nullcontext, AdapterLayers({}, torch.device("cpu")))
    return runner.run(asked), dict(runner.batch_sizes)


def test_a_forward_that_fails_for_one_prompt_is_run_again_for_each() -> None:
    answers, sizes = run(forwards(Encoder(), [1, 2], [-1, 2], [3, 4]))
    assert isinstance(answers[1], IndexError)
    assert [answer.last_hidden_state.flatten().tolist() for answer in answers[::2]] == [[1, 2], [3, 4]]
    assert sizes == {1: 3}


def test_texts_of_other_lengths_or_with_other_settings_never_meet() -> None:
    model = Encoder()
    masked = forwards(model, [5, 6], attention_mask=torch.ones(1, 2))
    _, sizes = run([*forwards(model, [1, 2], [1, 2, 3]), *masked])
    assert sizes == {1: 3}


def test_equal_texts_are_one_row() -> None:
    model = Encoder()
    answers, sizes = run(forwards(model, [1, 2], [3, 4], [1, 2]))
    assert (model.num_calls, sizes) == (1, {3: 1})
    assert [answer.last_hidden_state.flatten().tolist() for answer in answers] == [[1, 2], [3, 4], [1, 2]]


def test_a_model_whose_outputs_do_not_begin_with_the_batch_runs_unmerged() -> None:
    answers, sizes = run(forwards(Encoder(is_batch_first=False), [1, 2, 3], [4, 5, 6]))
    assert sizes == {1: 2}
    assert [answer.last_hidden_state.flatten().tolist() for answer in answers] == [[1, 2, 3], [4, 5, 6]]
