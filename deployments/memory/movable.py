"""Makes `Module.to` of a whole model move bitsandbytes' 8-bit layers completely.

These layers hold their weights twice. `Module.to` moves one of the two; the other, which is used for computing,
would stay on the GPU when the model leaves it (bitsandbytes 0.50: the layer's own `to` moves it, but a model moves
its layers by `_apply`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from deployments.memory.quantized import is_8bit


def make_movable(model: nn.Module) -> None:
    """Makes the model's 8-bit layers, if it has any, move everything that they hold."""
    for layer in model.modules():
        if is_8bit(layer):
            layer._apply = partial(_apply, layer)


def _apply(layer: Any, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    if layer.weight.CB is not None:
        layer.init_8bit_state()  # as the first forward does: moves the data from the weight to the layer's state
    type(layer)._apply(layer, change, recurse)
    layer.state.CB, layer.state.SCB = layer.weight.data, change(layer.state.SCB)
    moved: nn.Module = layer
    return moved
