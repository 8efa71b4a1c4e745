"""Tells whether a layer is bitsandbytes' own.

bitsandbytes is not imported here, so that replicas that do not need it do not import it
(deployments/stages/imports.py). Code that builds such a layer imports it; before that there are no such layers.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt


def is_4bit(layer: nn.Module) -> "TypeGuard[Linear4bit]":
    return isinstance(layer, _layer_class("Linear4bit"))


def is_8bit(layer: nn.Module) -> "TypeGuard[Linear8bitLt]":
    return isinstance(layer, _layer_class("Linear8bitLt"))


def _layer_class(name: str) -> Any:
    """Returns the class; before bitsandbytes is imported `()`, of which nothing is an instance."""
    return getattr(sys.modules.get("bitsandbytes.nn"), name, ())
