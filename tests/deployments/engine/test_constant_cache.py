"""The cache of tensors that do not change between forwards: each crosses once, as long as it lives."""

import gc

import pytest
import torch

from deployments.engine.constant_cache import CachedTensor, ConstantCache, ConstantSender, ShapeOf

CPU = torch.device("cpu")


@pytest.fixture
def embeds() -> torch.Tensor:
    return torch.arange(6.0).view(1, 2, 3)


def test_a_tensor_crosses_the_first_time_only(embeds: torch.Tensor) -> None:
    sender = ConstantSender()
    first, second = (sender.substitute({"encoder_hidden_states": embeds})["encoder_hidden_states"] for _ in "12")
    assert first.tensor is embeds
    assert (second.key, second.tensor) == (first.key, None)


def test_the_other_side_sees_the_same_inputs_each_time(embeds: torch.Tensor) -> None:
    sender, cache = ConstantSender(), ConstantCache(CPU)
    inputs = {"a": embeds, "nested": {"b": embeds + 1}, "guidance": None, "img_shapes": [[(1, 4, 4)]]}
    for _ in range(2):
        resolved = cache.resolve(sender.substitute(inputs))
        assert torch.equal(resolved["a"], embeds)
        assert torch.equal(resolved["nested"]["b"], embeds + 1)
        assert resolved["guidance"] is None
        assert resolved["img_shapes"] == [[(1, 4, 4)]]


def test_tensors_in_lists_cross_once_too(embeds: torch.Tensor) -> None:
    sender, cache = ConstantSender(), ConstantCache(CPU)
    inputs = {"cap_feats": [embeds, embeds + 1], "residuals": (embeds,), "x": [embeds, embeds]}
    for _ in range(2):
        substituted = sender.substitute(inputs, frozenset({"x"}))
        resolved = cache.resolve(substituted)
        assert torch.equal(resolved["cap_feats"][1], embeds + 1)
        assert torch.equal(resolved["residuals"][0], embeds)
        assert [tensor.shape for tensor in resolved["x"]] == [embeds.shape] * 2
    assert [cached.tensor for cached in (*substituted["cap_feats"], *substituted["residuals"])] == [None] * 3


def test_a_tensor_that_was_written_to_crosses_again(embeds: torch.Tensor) -> None:
    sender, cache = ConstantSender(), ConstantCache(CPU)
    cache.resolve(sender.substitute({"a": embeds}))
    embeds += 1
    assert torch.equal(cache.resolve(sender.substitute({"a": embeds}))["a"], embeds)


def test_equal_tensors_of_two_requests_are_kept_apart() -> None:
    sender = ConstantSender()
    one, other = torch.ones(3), torch.ones(3)
    assert sender.substitute({"a": one})["a"].key != sender.substitute({"a": other})["a"].key


def test_a_freed_tensor_is_released_once_on_the_other_side() -> None:
    sender, cache = ConstantSender(), ConstantCache(CPU)
    inputs = {"a": torch.ones(3)}
    substituted = sender.substitute(inputs)
    cache.resolve(substituted)
    assert sender.take_released() == ()
    key = substituted["a"].key
    del inputs, substituted
    gc.collect()
    released = sender.take_released()
    assert released == (key,)
    cache.release(released)
    with pytest.raises(KeyError):
        cache.resolve({"a": CachedTensor(key, None)})
    assert sender.take_released() == ()


def test_latents_cross_as_a_shape_where_values_do_not_matter(embeds: torch.Tensor) -> None:
    substituted = ConstantSender().substitute({"hidden_states": embeds.bfloat16()}, frozenset({"hidden_states"}))
    assert substituted["hidden_states"] == ShapeOf((1, 2, 3), torch.bfloat16)
    resolved = ConstantCache(CPU).resolve(substituted)["hidden_states"]
    assert resolved.shape == (1, 2, 3)
    assert resolved.dtype == torch.bfloat16


def test_what_is_cached_does_not_keep_the_message_it_came_in_alive() -> None:
    buffer = torch.zeros(1000)
    cache = ConstantCache(CPU)
    cached = cache.resolve({"a": CachedTensor(0, buffer[:3])})["a"]
    assert cached.untyped_storage().nbytes() == 3 * 4
