"""Which layers are bitsandbytes' own.

bitsandbytes is never imported here, for replicas that do not need it do without (deployments/stages/imports.py):
who builds such a layer has imported it, and before that there is none.
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
    """The class; before bitsandbytes is imported `()`, of which nothing is an instance."""
    return getattr(sys.modules.get("bitsandbytes.nn"), name, ())
