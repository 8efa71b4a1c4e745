"""Tensors keep their memory layout between stages, so that convolutions round alike."""

import pytest
import torch

from deployments.stages.tensors import laid, lies_channels_last

PICTURE = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
LATENTS = PICTURE[:1].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("tensor", "is_last"),
    [
        (PICTURE, False),
        (PICTURE.contiguous(memory_format=torch.channels_last), True),
        (LATENTS, True),
        (LATENTS.as_strided(LATENTS.shape, (3, *LATENTS.stride()[1:])), False),  # as Kandinsky 5's, from reshape
        (PICTURE.transpose(2, 3), False),
        (PICTURE[0], False),
    ],
)
def test_a_tensor_is_sent_as_convolutions_take_it_to_lie(tensor: torch.Tensor, is_last: bool) -> None:
    assert lies_channels_last(tensor) == is_last
    if tensor.ndim == 4:
        # interpolate keeps its input's layout, so the output's strides show how torch reads that layout.
        made = torch.nn.functional.interpolate(laid(tensor.clone().contiguous(), is_last), scale_factor=2)
        plain = torch.nn.functional.interpolate(tensor, scale_factor=2)
        assert made.stride() == plain.stride()
