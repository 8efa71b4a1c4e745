"""What the ingress must know of an architecture before anything is loaded, for those most asked for.

A pipeline without an entry tells the same of itself (checkpoints/derived.py), which costs some seconds of a start.
If its denoiser's forwards are to merge, it needs a rule in engine/merge.py; if it is to be cut into shards and
diffusers does not declare its blocks, a line in engine/blocks.py.

Nothing here imports torch: the ingress asks what sizes a checkpoint makes, and what its calls take (calls.py).
"""

from deployments.families.calls import Call, Defaults
from deployments.families.family import Family
from deployments.families.flux import FLUX
from deployments.families.geometry import Geometry
from deployments.families.qwen_image import QWEN_IMAGE
from deployments.families.stable_diffusion import SD3, SD15, SDXL
from deployments.families.wan import WAN

FAMILIES = {family.name: family for family in (FLUX, SD15, SDXL, SD3, QWEN_IMAGE, WAN)}

__all__ = ["FAMILIES", "Call", "Defaults", "Family", "Geometry"]
