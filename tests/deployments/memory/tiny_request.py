"""A request that any tiny checkpoint serves quickly."""

from deployments.request import GenerationRequest, Prompt
from tests.tiny_models import family_of

PROMPT = "a red cat"
NUM_STEPS = 2


def build_request(family: str) -> GenerationRequest:
    of = family_of(family)
    return GenerationRequest(
        Prompt(PROMPT, None, is_guided=False),
        width=64,
        height=64,
        num_frames=5 if of.media == "video" else 1,
        num_inference_steps=NUM_STEPS,
        guidance_scale=3.5 if of.call.guidance == "true_cfg_scale" else 1.0,
        true_cfg_scale=1.0 if of.call.guidance == "true_cfg_scale" else None,
        seed=7,
        output_format="png",
        output_compression=100,
        fps=16,
    )
