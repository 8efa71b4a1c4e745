"""Step caches: which steps compute, and what replaces the predictions of the other steps."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState

from deployments.answers import ForwardCounts
from deployments.engine.step_cache import StepCache, extrapolation
from deployments.options.step_cache import StepCacheConfig

NUM_STEPS = 12
SHAPE = (1, 4, 6)


def loop(
    cache: StepCache, num_steps: int = NUM_STEPS, *, passes: int = 1, component: str = "transformer"
) -> list[Any]:
    """Returns what a pipeline gets at each step: the prediction, or a tuple of them for several passes."""
    scheduler = SimpleNamespace(timesteps=torch.arange(num_steps, 0, -1))
    given = []
    for step in range(num_steps):
        asked = [
            cache.begin(number, component, {"hidden_states": torch.full(SHAPE, 10.0 * number + step)})()[0]
            for number in range(passes)
        ]
        given.append(asked[0] if passes == 1 else tuple(asked))
        cache.after_step(scheduler, step)
    return given


def model(
    function: Callable[[torch.Tensor], torch.Tensor] = lambda x: x, computed: list[float] | None = None
) -> Callable[..., Callable[[], Any]]:
    """Returns an engine's `begin` for a model that is this function.

    computed: collects the first value of each input.
    """

    def begin(_place: int, _component: str, inputs: Any) -> Callable[[], Any]:
        if computed is not None:
            computed.append(float(inputs["hidden_states"].flatten()[0]))
        return lambda: (function(inputs["hidden_states"]),)

    return begin


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_polynomial_of_the_order_is_met_exactly(order: int) -> None:
    times = [9.0, 7.5, 7.0, 4.0][: order + 1]
    weights = extrapolation(times, 2.5)
    for power in range(order + 1):
        assert sum(w * t**power for w, t in zip(weights, times, strict=True)) == pytest.approx(2.5**power)


def test_of_equal_times_the_last_counts() -> None:
    assert extrapolation([3.0, 2.0, 2.0], 1.0) == pytest.approx([-1.0, 0.0, 2.0])


@pytest.mark.parametrize(
    ("config", "computing"),
    [
        ({}, [0, 1, 2, 4, 6, 8, 10, 11]),
        ({"interval": 3}, [0, 1, 2, 5, 8, 11]),
        ({"interval": 4, "first_steps": 2, "last_steps": 0}, [0, 1, 5, 9]),
        ({"interval": 100, "first_steps": 1, "order": 0}, [0, 11]),
        ({"interval": 100, "first_steps": 1, "order": 2}, [0, 1, 2, 11]),
        ({"first_steps": 11}, list(range(12))),
    ],
)
def test_every_nth_step_computes_between_the_first_and_the_last(
    config: dict[str, Any], computing: list[int]
) -> None:
    computed: list[float] = []
    cache = StepCache(StepCacheConfig(**config), model(computed=computed))
    loop(cache)
    assert computed == computing
    assert cache.counts == ForwardCounts(len(computing), NUM_STEPS)


def test_without_a_config_every_step_computes_and_nothing_is_kept() -> None:
    kept: list[int] = []
    cache = StepCache(None, model(), kept.append)
    loop(cache)
    assert (cache.counts, kept) == (ForwardCounts(NUM_STEPS, NUM_STEPS), [])


def test_at_equal_steps_the_first_order_is_that_of_taylorseer() -> None:
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(SHAPE, generator=generator) for _ in range(NUM_STEPS)]
    given = loop(StepCache(StepCacheConfig(), model(lambda x: values[int(x.flatten()[0])])))
    state = TaylorSeerState(taylor_factors_dtype=torch.float32, max_order=1)
    for step in range(6):
        state.current_step = step
        if step in (3, 5):
            torch.testing.assert_close(given[step], state.predict()[0])
        else:
            state.update((values[step],))
            assert torch.equal(given[step], values[step])


def test_each_pass_is_extrapolated_from_its_own_predictions() -> None:
    given = loop(StepCache(StepCacheConfig(interval=3), model(lambda x: 3 * x + 1)), passes=2)
    for step, (one, other) in enumerate(given):
        torch.testing.assert_close(one, torch.full(SHAPE, 3.0 * step + 1))
        torch.testing.assert_close(other, torch.full(SHAPE, 3.0 * (10 + step) + 1))


def test_what_the_pipeline_writes_into_its_prediction_is_not_kept() -> None:
    cache = StepCache(StepCacheConfig(), model(lambda x: x.clone()))
    scheduler = SimpleNamespace(timesteps=torch.arange(NUM_STEPS, 0, -1))
    for step in range(NUM_STEPS):
        [prediction] = cache.begin(0, "transformer", {"hidden_states": torch.full(SHAPE, float(step))})()
        torch.testing.assert_close(prediction, torch.full(SHAPE, float(step)))
        prediction.zero_()
        cache.after_step(scheduler, step)


def test_half_precision_is_extrapolated_in_float32() -> None:
    given = loop(StepCache(StepCacheConfig(interval=6), model(lambda x: (1 + x / 128).to(torch.bfloat16))))
    assert given[7].dtype is torch.bfloat16
    torch.testing.assert_close(given[7].float(), torch.full(SHAPE, 1 + 7 / 128), rtol=0, atol=0)


def test_another_loop_of_the_same_request_begins_anew() -> None:
    computed: list[float] = []
    cache = StepCache(StepCacheConfig(), model(computed=computed))
    loop(cache)
    loop(cache)
    assert computed == [0, 1, 2, 4, 6, 8, 10, 11] * 2


def test_the_second_expert_computes_until_it_can_be_extrapolated() -> None:
    asked: list[str] = []

    def begin(_place: int, component: str, inputs: Any) -> Callable[[], Any]:
        asked.append(component)
        return lambda: (inputs["hidden_states"],)

    cache = StepCache(StepCacheConfig(), begin)
    scheduler = SimpleNamespace(timesteps=torch.arange(NUM_STEPS, 0, -1))
    for step in range(NUM_STEPS):
        component = "transformer" if step < 5 else "transformer_2"
        [prediction] = cache.begin(0, component, {"hidden_states": torch.full(SHAPE, float(step))})()
        torch.testing.assert_close(prediction, torch.full(SHAPE, float(step)))
        cache.after_step(scheduler, step)
    assert asked == ["transformer"] * 4 + ["transformer_2"] * 5  # steps 0 1 2 4, then 5 6 8 10 11


@pytest.mark.parametrize(("change", "at_most"), [(0.0, 4), (1e-3, 5), (10.0, 12)])
def test_easy_cache_computes_the_more_the_predictions_change(change: float, at_most: int) -> None:
    cache = StepCache(StepCacheConfig(kind="easy_cache"), model(lambda x: 1 + change * x))
    given = loop(cache)
    assert cache.counts.computed <= at_most
    assert (cache.counts.computed == NUM_STEPS) == (change == 10.0)
    for step, prediction in enumerate(given):
        torch.testing.assert_close(prediction, torch.full(SHAPE, 1 + change * step))


def test_what_will_be_kept_is_told_in_the_first_step() -> None:
    kept: list[int] = []
    cache = StepCache(StepCacheConfig(order=2), model(), kept.append)
    loop(cache, passes=2)
    loop(cache, passes=2)
    assert kept == [3 * 4 * 24] * 2  # bytes of three predictions, once for each pass


def test_so_is_what_easy_cache_compares_with() -> None:
    kept: list[int] = []
    loop(StepCache(StepCacheConfig(kind="easy_cache"), model(), kept.append), passes=2)
    assert kept == [(2 + 2) * 4 * 24, 2 * 4 * 24]


def test_a_controlnets_residuals_are_kept_once() -> None:
    kept: list[int] = []
    loop(StepCache(StepCacheConfig(), model(), kept.append), component="controlnet")
    assert kept == [4 * 24]


def test_easy_cache_goes_by_the_predictions_and_not_by_a_controlnets_residuals() -> None:
    def begin(_place: int, component: str, inputs: Any) -> Callable[[], Any]:
        of = inputs["hidden_states"]
        return lambda: (torch.ones(3), torch.ones(5)) if component == "controlnet" else (10.0 * of,)

    cache = StepCache(StepCacheConfig(kind="easy_cache"), begin)
    scheduler = SimpleNamespace(timesteps=torch.arange(NUM_STEPS, 0, -1))
    for step in range(NUM_STEPS):
        for component in ("controlnet", "transformer"):
            cache.begin(0, component, {"hidden_states": torch.full(SHAPE, float(step))})()
        cache.after_step(scheduler, step)
    assert cache.counts.computed == 2 * NUM_STEPS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"threshold": 0.1}, "threshold is only for kind easy_cache, got kind taylor_seer"),
        ({"kind": "easy_cache", "interval": 3}, "interval is only for kind taylor_seer, got kind easy_cache"),
        ({"kind": "tea_cache"}, "Input should be 'taylor_seer' or 'easy_cache'"),
        ({"interval": 1}, "greater than or equal to 2"),
        ({"threshhold": 0.1}, "did you mean 'threshold'"),
    ],
)
def test_what_cannot_be_meant_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepCacheConfig(**config)
