"""Tensors cross once, as long as they live."""

import gc

import pytest
import torch

from deployments.engine.outline import Held, Holder, Outliner, ShapeOf

CPU = torch.device("cpu")


@pytest.fixture
def embeds() -> torch.Tensor:
    return torch.arange(6.0).view(1, 2, 3)


def test_a_tensor_crosses_the_first_time_only(embeds: torch.Tensor) -> None:
    outliner = Outliner()
    first, second = (outliner.outline({"encoder_hidden_states": embeds})["encoder_hidden_states"] for _ in "12")
    assert first.tensor is embeds
    assert (second.key, second.tensor) == (first.key, None)


def test_the_other_side_sees_the_same_inputs_each_time(embeds: torch.Tensor) -> None:
    outliner, holder = Outliner(), Holder(CPU)
    inputs = {"a": embeds, "nested": {"b": embeds + 1}, "guidance": None, "img_shapes": [[(1, 4, 4)]]}
    for _ in range(2):
        filled = holder.fill(outliner.outline(inputs))
        assert torch.equal(filled["a"], embeds)
        assert torch.equal(filled["nested"]["b"], embeds + 1)
        assert filled["guidance"] is None
        assert filled["img_shapes"] == [[(1, 4, 4)]]


def test_tensors_in_lists_cross_once_too(embeds: torch.Tensor) -> None:
    outliner, holder = Outliner(), Holder(CPU)
    inputs = {"cap_feats": [embeds, embeds + 1], "residuals": (embeds,), "x": [embeds, embeds]}
    for _ in range(2):
        outlined = outliner.outline(inputs, frozenset({"x"}))
        filled = holder.fill(outlined)
        assert torch.equal(filled["cap_feats"][1], embeds + 1)
        assert torch.equal(filled["residuals"][0], embeds)
        assert [tensor.shape for tensor in filled["x"]] == [embeds.shape] * 2
    assert [held.tensor for held in (*outlined["cap_feats"], *outlined["residuals"])] == [None] * 3


def test_a_tensor_that_was_written_to_crosses_again(embeds: torch.Tensor) -> None:
    outliner, holder = Outliner(), Holder(CPU)
    holder.fill(outliner.outline({"a": embeds}))
    embeds += 1
    assert torch.equal(holder.fill(outliner.outline({"a": embeds}))["a"], embeds)


def test_equal_tensors_of_two_requests_are_kept_apart() -> None:
    outliner = Outliner()
    one, other = torch.ones(3), torch.ones(3)
    assert outliner.outline({"a": one})["a"].key != outliner.outline({"a": other})["a"].key


def test_a_freed_tensor_is_released_once_on_the_other_side() -> None:
    outliner, holder = Outliner(), Holder(CPU)
    inputs = {"a": torch.ones(3)}
    outlined = outliner.outline(inputs)
    holder.fill(outlined)
    assert outliner.take_released() == ()
    key = outlined["a"].key
    del inputs, outlined
    gc.collect()
    released = outliner.take_released()
    assert released == (key,)
    holder.release(released)
    with pytest.raises(KeyError):
        holder.fill({"a": Held(key, None)})
    assert outliner.take_released() == ()


def test_latents_cross_as_a_shape_where_values_do_not_matter(embeds: torch.Tensor) -> None:
    outlined = Outliner().outline({"hidden_states": embeds.bfloat16()}, frozenset({"hidden_states"}))
    assert outlined["hidden_states"] == ShapeOf((1, 2, 3), torch.bfloat16)
    filled = Holder(CPU).fill(outlined)["hidden_states"]
    assert filled.shape == (1, 2, 3)
    assert filled.dtype == torch.bfloat16


def test_what_is_held_does_not_keep_the_message_it_came_in_alive() -> None:
    buffer = torch.zeros(1000)
    holder = Holder(CPU)
    held = holder.fill({"a": Held(0, buffer[:3])})["a"]
    assert held.untyped_storage().nbytes() == 3 * 4
