"""The most used architectures: what the ingress must know of each before anything is loaded.

The same facts of a pipeline without an entry here are derived (checkpoints/derived.py), which takes some seconds
at the start. If forwards of its denoiser are to merge, it needs a rule in engine/merge.py; if it is to be cut into
shards and diffusers does not declare its blocks, it needs a line in engine/blocks.py.

Nothing here imports torch, because the ingress uses it for the sizes that a checkpoint makes and the parameters of
its calls (calls.py).
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
