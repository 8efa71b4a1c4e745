"""Predictions that are waited for only when a pipeline computes with them."""

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from deployments.engine.passes import Passes

LATENTS = torch.arange(24.0).reshape(1, 4, 6)


class Forwards:
    """Records which forwards have begun, in which place, and which were waited for."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.read: list[int] = []
        self.passes = Passes(self._begin)

    def ask(self, times: float = 1.0) -> torch.Tensor:
        [prediction] = self.passes("transformer", {"hidden_states": LATENTS * times})
        return prediction

    def _begin(self, place: int, _component: str, inputs: Any) -> Callable[[], Any]:
        number = len(self.begun)
        self.begun.append(place)

        def wait() -> tuple[torch.Tensor]:
            self.read.append(number)
            return (inputs["hidden_states"] + 1,)

        return wait


def test_the_second_pass_begins_before_the_first_is_waited_for() -> None:
    forwards = Forwards()
    conditional, unconditional = forwards.ask(2.0)[:, :3], forwards.ask()[:, :3]
    assert (forwards.begun, forwards.read) == ([0, 1], [])
    guided = unconditional + 3.5 * (conditional - unconditional)
    assert type(guided) is torch.Tensor
    plain, other = LATENTS[:, :3] + 1, 2 * LATENTS[:, :3] + 1
    assert torch.equal(guided, plain + 3.5 * (other - plain))
    assert forwards.passes.num_unread == 0


def test_one_that_was_read_leaves_its_place_to_the_next() -> None:
    forwards = Forwards()
    for _ in range(2):
        first, second = forwards.ask(), forwards.ask()
        first + second
    forwards.ask().mean()
    forwards.ask()
    assert forwards.begun == [0, 1, 0, 1, 0, 0]
    assert forwards.passes.num_unread == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: -x,
        lambda x: x.float(),
        lambda x: x.chunk(2, dim=1)[0],
        lambda x: torch.cat([x, x]),
        lambda x: torch.stack([x[0], x[0]]),
        lambda x: torch.norm(x, dim=-1, keepdim=True),
        lambda x: x.std(dim=list(range(1, x.ndim)), keepdim=True),
        lambda x: torch.where(x > 3, x, torch.zeros_like(x)),
        lambda x: x[:, torch.tensor([2, 0])],
        lambda x: x[x > 3],
        lambda x: torch.tensor(x.shape),
        lambda x: x.clone().mul_(2),
        lambda x: torch.nn.functional.pad(x, (1, 1)),
        lambda x: torch.einsum("bij->bji", x),
    ],
)
def test_whatever_is_computed_with_it_is_computed_with_the_tensor(use: Callable[[Any], torch.Tensor]) -> None:
    assert torch.equal(use(Forwards().ask()), use(LATENTS + 1))


def test_it_is_waited_for_once() -> None:
    forwards = Forwards()
    prediction = forwards.ask()
    assert isinstance(prediction, torch.Tensor)
    assert prediction.shape == LATENTS.shape
    assert prediction.dtype is torch.float32
    assert (prediction[0] + prediction[0]).shape == (4, 6)
    assert forwards.read == [0]


def failing(*_: Any) -> Callable[[], Any]:
    """Begins a forward that may be waited for once, like the engine's, and fails."""
    errors = [ConnectionError("the shard group is lost")]

    def wait() -> Any:
        raise errors.pop()

    return wait


@pytest.mark.parametrize("part", [slice(None), slice(1)])
def test_a_failed_pass_fails_wherever_its_prediction_is_used(part: slice) -> None:
    [prediction] = Passes(failing)("transformer", {})
    prediction = prediction[part]
    for _ in range(3):
        with pytest.raises(ConnectionError, match="the shard group is lost"):
            prediction * 2


def test_a_failed_pass_keeps_nothing_of_the_call_that_it_failed_in() -> None:
    """Embeddings and latents are freed with the request, not when Python next collects cycles."""
    seen: list[weakref.ref[torch.Tensor]] = []

    def call() -> None:
        [prediction] = Passes(failing)("transformer", {})
        latents = LATENTS.clone()
        seen.append(weakref.ref(latents))
        with suppress(ConnectionError):
            prediction * 2
        latents * prediction

    gc.disable()
    try:
        with pytest.raises(ConnectionError):
            call()
        assert seen[0]() is None
    finally:
        gc.enable()


def test_a_model_that_returns_no_single_tensor_is_told() -> None:
    [prediction] = Passes(lambda *_: lambda: ([LATENTS],))("transformer", {})
    with pytest.raises(ValueError, match="transformer returns list, not a tensor"):
        prediction * 2
