"""Weighted and long prompts draw what plain diffusers draws with compel's embeddings."""

from dataclasses import replace
from functools import cache
from typing import Any

import compel
import pytest
import torch

from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.errors import CannotServe, WrongField
from deployments.request import GenerationRequest, Prompt
from deployments.stages import load_stage
from deployments.stages.encode import TextEncoding
from deployments.stages.tensors import each_tensor
from deployments.stages.texts.weighting import as_compel_writes
from tests.deployments import plain
from tests.deployments.variants import build_request, denoise, load_denoising, read_model
from tests.thorough import usually

READERS = {"sd15": compel.CompelForSD, "sdxl": compel.CompelForSDXL}
LONG = "a tin robot, " * 30 + "under a (blue)1.4 moon"
PROMPTS = [
    ("a (red)1.5 cat on a mat--", "blurry"),
    ("a red cat", "(blurry)1.3, dark"),
    (LONG, "blurry"),
    ("a red cat", LONG),
    (LONG, None),
    ('("a red cat", "a blue dog").blend(0.7, 0.3)', ""),
    ("", ""),
]


@cache
def weighing(family: str) -> ModelConfig:
    return read_model(fetch_checkpoint(f"tiny://{family}", ()), prompt_weighting=True)


@cache
def encoding_of(family: str) -> TextEncoding:
    return load_stage("encode", weighing(family), EncoderConfig())


def asking(family: str, text: str, negative: str | None) -> GenerationRequest:
    prompt = Prompt(text, negative, is_guided=True, is_weighted=True)
    return replace(build_request(weighing(family)), prompt=prompt, guidance_scale=4.0)


@torch.no_grad()
def draw_plain(family: str, request: GenerationRequest) -> torch.Tensor:
    pipe: Any = plain.load_plain(fetch_checkpoint(f"tiny://{family}", ()))
    negative = request.prompt.negative_text
    if negative is None and family == "sd15":
        negative = ""  # else the pipeline would pad it to more than CLIP takes
    made = READERS[family](pipe)(request.prompt.text, negative_prompt=negative)
    embeds = {
        "prompt_embeds": made.embeds,
        "pooled_prompt_embeds": made.pooled_embeds,
        "negative_prompt_embeds": made.negative_embeds,
        "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
    }
    return plain.latents_of(
        pipe,
        **{name: value for name, value in embeds.items() if value is not None},
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", usually(READERS, "sdxl".__eq__))
def test_weighted_and_long_prompts_draw_what_compels_embeddings_draw(family: str) -> None:
    stage = load_denoising(weighing(family))
    for text, negative in PROMPTS:
        request = asking(family, text, negative)
        latents = denoise(stage, encoding_of(family).encode(request), request).latents
        assert torch.equal(latents, draw_plain(family, request)), text
    stage.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", usually(READERS, "sdxl".__eq__))
def test_a_request_that_declines_is_read_as_it_is(family: str) -> None:
    asked = asking(family, "a (red)1.5 cat", "blurry")
    declined = replace(asked, prompt=replace(asked.prompt, is_weighted=False))
    usual = load_stage("encode", read_model(fetch_checkpoint(f"tiny://{family}", ())), EncoderConfig())
    as_it_is = list(each_tensor(usual.encode(declined)))
    assert all(map(torch.equal, each_tensor(encoding_of(family).encode(declined)), as_it_is))
    assert not all(map(torch.equal, each_tensor(encoding_of(family).encode(asked)), as_it_is))


@pytest.mark.slow
def test_weighted_prompts_that_wait_share_forwards_and_each_gets_its_own() -> None:
    requests = [asking("sd15", f"a ({word})1.5 cat", "blurry") for word in ("red", "blue", "green")]
    stage = load_stage("encode", weighing("sd15"), EncoderConfig(cache_mib=0))
    alone = [list(each_tensor(stage.encode(request))) for request in requests]
    before = sum(n for size, n in stage.batch_sizes.items() if size > 1)
    together = stage.encode_together([(request, None) for request in requests])
    for one, made in zip(alone, together, strict=True):
        assert not isinstance(made, Exception)
        for tensor, other in zip(one, each_tensor(made.encodings), strict=True):
            torch.testing.assert_close(tensor, other, atol=2e-5, rtol=2e-5)
    assert sum(n for size, n in stage.batch_sizes.items() if size > 1) > before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "negative", "field"),
    [
        ('("a", "b").and(1, 2, 3)', "", "prompt"),
        ("()", "", "prompt"),
        ("a cat", '("a", "b").and(1, 2, 3)', "negative_prompt"),
    ],
)
def test_weights_that_cannot_be_read_are_the_requests_fault(text: str, negative: str, field: str) -> None:
    with pytest.raises(WrongField, match=f"{field}: its weights cannot be read") as wrong:
        encoding_of("sd15").encode(asking("sd15", text, negative))
    assert wrong.value.param == field
    assert wrong.value.message.startswith(f"{field}: ")


@pytest.mark.slow
def test_a_pipeline_of_another_encoder_is_refused_at_start() -> None:
    model = read_model(fetch_checkpoint("tiny://flux", ()), prompt_weighting=True)
    with pytest.raises(CannotServe, match="FluxPipeline reads with CLIPTextModel, T5EncoderModel: leave it out"):
        load_stage("encode", model, EncoderConfig())


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a (red:1.3) cat", "a (red)1.3 cat"),
        ("(a (red:1.3) cat:0.8), moon", "(a (red)1.3 cat)0.8, moon"),
        ("(a cat: 1.5 )", "(a cat)1.5"),
        (r"\(a cat:1.5\)", r"\(a cat:1.5\)"),
        ("a (cat)1.3 at 10:30", "a (cat)1.3 at 10:30"),
        ("(a cat at 10:30)", "(a cat at 10)30"),
        ("cat)) ((", "cat)) (("),
        ("a cat++", "a cat++"),
    ],
)
def test_weights_as_other_programs_write_them_are_as_compel_does(text: str, written: str) -> None:
    assert as_compel_writes(text) == written
