"""One file per architecture. A new one costs an entry here, a YAML in configs/ and a row in the tests.

If its denoiser's forwards are to merge, a rule in engine/merge.py; if modules come after its blocks, their names
in engine/blocks.py.

Nothing here imports torch: the ingress reads defaults from these entries, and what sizes a checkpoint makes.
"""

from deployments.families.family import Defaults, Family
from deployments.families.flux import FLUX
from deployments.families.geometry import Geometry
from deployments.families.qwen_image import QWEN_IMAGE
from deployments.families.stable_diffusion import SD3, SD15, SDXL
from deployments.families.wan import WAN

FAMILIES = {family.name: family for family in (FLUX, SD15, SDXL, SD3, QWEN_IMAGE, WAN)}

__all__ = ["FAMILIES", "Defaults", "Family", "Geometry"]
