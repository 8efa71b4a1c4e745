"""Finds the methods of diffusers' pipelines that run text encoders, by reading their source."""

import diffusers
import pytest

from deployments.stages.texts.encoding_methods import encoding_methods

ENCODERS = frozenset({"text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder", "connectors"})


@pytest.mark.parametrize(
    ("class_name", "methods"),
    [
        ("FluxPipeline", {"encode_prompt"}),
        ("StableDiffusionPipeline", {"encode_prompt"}),
        ("QwenImageEditPipeline", {"encode_prompt"}),
        ("WanImageToVideoPipeline", {"encode_prompt", "encode_image"}),
        ("LTX2Pipeline", {"enhance_prompt", "encode_prompt", "connectors"}),
    ],
)
def test_they_are_what_calls_an_encoder(class_name: str, methods: set[str]) -> None:
    found = encoding_methods(getattr(diffusers, class_name), ENCODERS)
    assert set(found) - {"prepare_ip_adapter_image_embeds"} == methods


def test_what_also_touches_the_vae_prepares_latents() -> None:
    """SDXL's `prepare_latents` looks at a text encoder only to find out whether it is offloaded."""
    assert "prepare_latents" not in encoding_methods(diffusers.StableDiffusionXLImg2ImgPipeline, ENCODERS)
