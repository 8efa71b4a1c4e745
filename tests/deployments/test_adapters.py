"""LoRA adapters per request, against plain diffusers with PEFT: alone and merged, over one shard and over two."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deployments.checkpoints.components import fetch_stage, weightless
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.adapters import AdapterLayers
from deployments.errors import WrongField
from deployments.options.adapter import Adapter, AdapterCatalog, AdapterConfig, ScaledAdapter
from deployments.request import GenerationRequest, Prompt
from deployments.stages import load_stage
from deployments.stages.adapters import AdapterReader, AdapterStore
from deployments.stages.call_arguments import call_arguments
from deployments.stages.pipeline import load_pipeline
from tests.conftest import decoded_by
from tests.deployments.lora import load_with, write_lora
from tests.deployments.variants import build_request, denoise, load_ranks, read_model
from tests.thorough import usually

FAMILIES = ["flux", "sd15", "sdxl", "sd3", "qwen-image", "wan"]
TOLERANCE = 2e-5
SCALES: tuple[tuple[tuple[str, float], ...], ...] = (
    (("a", 1.0),),
    (("b", 0.7),),
    (("a", 0.5), ("b", -0.4)),
    (),
)
"""Adapters and their scales, of four requests at once: one adapter, the other, both, none."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, AdapterConfig]]:
    """Returns a function that writes two adapters of a family, the first with weights for text encoders."""

    @cache
    def write(family: str) -> dict[str, AdapterConfig]:
        checkpoint, folder = fetch_checkpoint(f"tiny://{family}", ()), tmp_path_factory.mktemp(family)
        a = write_lora(folder / "a", checkpoint, seed=1, rank=4, texts=True)
        b = write_lora(folder / "b", checkpoint, seed=2, rank=8)
        return {"a": AdapterConfig(source=str(a)), "b": AdapterConfig(source=str(b))}

    return write


def served(family: str, adapters: dict[str, AdapterConfig]) -> ModelConfig:
    return read_model(fetch_checkpoint(f"tiny://{family}", ()), adapters=adapters)


def asked(model: ModelConfig, scales: tuple[tuple[str, float], ...], seed: int = 3) -> GenerationRequest:
    catalog = AdapterCatalog(model.adapters, None)
    named = {name: catalog.find(name) for name in model.adapters}
    scaled = tuple(ScaledAdapter(adapter, scale) for name, scale in scales if (adapter := named[name]))
    request = build_request(model, num_inference_steps=4)
    return replace(request, seed=seed, adapters=scaled, prompt=Prompt(f"cat {seed}", "", is_guided=True))


def draw_plain(model: ModelConfig, request: GenerationRequest) -> torch.Tensor:
    """Returns the latents that plain diffusers decodes, with adapters loaded by PEFT."""
    return _draw_plain(model.checkpoint, model.architecture.max_sequence_length, request)


@cache
def _draw_plain(checkpoint: str, max_sequence_length: int | None, request: GenerationRequest) -> torch.Tensor:
    pipe = load_with(Path(checkpoint), {each.adapter.name: each.adapter.source for each in request.adapters})
    if request.adapters:
        names, scales = zip(*((each.adapter.name, each.scale) for each in request.adapters), strict=True)
        pipe.set_adapters(list(names), list(scales))
    with decoded_by(pipe) as decoded:
        pipe(**call_arguments(type(pipe), request, max_sequence_length))
    return decoded[0]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("family", usually(FAMILIES, "flux".__eq__))
def test_requests_with_different_adapters_fly_merged_and_each_is_as_alone(
    family: str, shards: int, adapters: Callable[[str], dict[str, AdapterConfig]]
) -> None:
    model = served(family, adapters(family))
    requests = [asked(model, scales, seed) for seed, scales in enumerate(SCALES)]
    encoder = load_stage("encode", model, EncoderConfig())
    encodings = [each.encodings for each in encoder.encode_together([(request, None) for request in requests])]
    times = shards  # over several shards fewer requests merge, so each is sent this many times
    stage = load_ranks(model, shards=shards, batch_wait_ms=1000, max_batch_tokens=None)
    try:
        with ThreadPoolExecutor(times * len(requests)) as threads:
            answers = threads.map(lambda of: denoise(stage, *of), [*zip(encodings, requests, strict=True)] * times)
            drawn = [each.latents for each in answers]
        assert max(stage.stats().queue.batch_sizes) > 1
    finally:
        stage.close()
    expected = [draw_plain(model, request) for request in requests]
    bare = draw_plain(model, replace(requests[0], adapters=()))
    assert not torch.allclose(expected[0], bare, atol=1e-2)
    for latents, of in zip(drawn, expected * times, strict=True):
        np.testing.assert_allclose(latents.numpy(), of.numpy(), atol=TOLERANCE * float(of.abs().max()), rtol=0)


def test_texts_whose_rows_a_model_joins_meet_only_where_they_have_as_many(tmp_path: Path) -> None:
    """Z-Image joins the rows of all texts, each padded to a multiple of 32 tokens.

    So requests with different adapters merge only if their texts are padded to equal lengths.
    """
    layer = "transformer.cap_embedder.1"
    weights = {f"{layer}.lora_A.weight": torch.randn(4, 64), f"{layer}.lora_B.weight": torch.randn(128, 4)}
    source = written(tmp_path, **weights).source
    model = served("z-image", {"a": AdapterConfig(source=source)})
    texts = ["a cat", "a cat " * 10, "a dog", "a dog " * 10]
    requests = [
        replace(asked(model, scales, seed), prompt=Prompt(text, "", is_guided=True))
        for seed, (text, scales) in enumerate(zip(texts, ((("a", 1.0),), (), (), (("a", 0.5),)), strict=True))
    ]
    encoder = load_stage("encode", model, EncoderConfig())
    encodings = [encoder.encode(request) for request in requests]
    stage = load_ranks(model, batch_wait_ms=1000, max_batch_tokens=None)
    try:
        alone = [denoise(stage, *of).latents for of in zip(encodings, requests, strict=True)]
        with ThreadPoolExecutor(len(requests)) as threads:
            answers = threads.map(lambda of: denoise(stage, *of), zip(encodings, requests, strict=True))
            drawn = [each.latents for each in answers]
        assert max(stage.stats().queue.batch_sizes) > 1
    finally:
        stage.close()
    for latents, of in zip(drawn, alone, strict=True):
        np.testing.assert_allclose(latents.numpy(), of.numpy(), atol=TOLERANCE * float(of.abs().max()), rtol=0)


@pytest.fixture(scope="module")
def reader() -> AdapterReader:
    """A reader for the tiny FLUX."""
    model = read_model(fetch_checkpoint("tiny://flux", ()))
    folder, index = fetch_stage(model, "denoise", "float32")
    pipe = load_pipeline(folder, index, weightless(index), TransformerConfig(), variant=None)
    return AdapterReader(pipe, folder, index, torch.float32)


def written(folder: Path, **weights: torch.Tensor) -> Adapter:
    save_file(weights, folder / "lora.safetensors")
    return Adapter("it", str(folder / "lora.safetensors"))


def pair(layer: str, rank: int, num_in: int, num_out: int) -> dict[str, torch.Tensor]:
    name = f"transformer.{layer}"
    return {f"{name}.lora_A.weight": torch.ones(rank, num_in), f"{name}.lora_B.weight": torch.ones(num_out, rank)}


BLOCK = "transformer_blocks.0.attn"
LAYER = f"{BLOCK}.to_q"
NAN = torch.full((4, 128), torch.nan)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (pair(LAYER, 4, 256, 128), LAYER),
        (pair(LAYER, 4, 128, 96), LAYER),
        (pair("transformer_blocks.9.attn.to_q", 4, 128, 128), "transformer_blocks.9.attn.to_q"),
        ({f"transformer.{LAYER}.lokr_w1": torch.ones(4, 4)}, "a LoKr"),
        ({"lora_unet_double_blocks_0_img_attn_proj.hada_w1_a": torch.ones(4, 4)}, "a LoHa"),
        (pair(LAYER, 4, 128, 128) | {f"transformer.{LAYER}.lora_magnitude_vector": torch.ones(128)}, "a DoRA"),
        ({"nothing": torch.ones(1)}, "Invalid LoRA checkpoint"),
        (
            pair(LAYER, 4, 128, 128) | {f"transformer.{BLOCK}.norm_q.weight": torch.ones(32)},
            "norm_q.* whole layers",
        ),
        (pair(LAYER, 4, 128, 128) | {f"transformer.{LAYER}.lora_A.weight": NAN}, f"{LAYER} .*NaN"),
        ({f"model.{name}": weight for name, weight in pair("q", 4, 4, 4).items()}, r"model\.transformer\.q"),
    ],
    ids=["in", "out", "no such layer", "LoKr", "LoHa", "DoRA", "no LoRA", "norms", "NaN", "another layout"],
)
def test_what_does_not_fit_is_the_requests_fault_and_says_why(
    reader: AdapterReader, tmp_path: Path, weights: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(WrongField, match=words) as refused:
        reader.read(written(tmp_path, **weights))
    assert refused.value.param == "lora"
    assert "'it'" in refused.value.message


@pytest.mark.parametrize("kept", [0, 100])
def test_a_file_that_is_gone_or_half_there_is_the_requests_fault_and_says_so(
    reader: AdapterReader, tmp_path: Path, kept: int
) -> None:
    adapter = written(tmp_path, **pair(LAYER, 4, 128, 128))
    file = Path(adapter.source)
    file.write_bytes(file.read_bytes()[:kept]) if kept else file.unlink()
    with pytest.raises(WrongField, match="cut short" if kept else "does not exist"):
        reader.read(adapter)


def test_kohyas_layout_is_read_with_its_alpha(reader: AdapterReader, tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_proj"
    weights = {
        f"{name}.lora_down.weight": torch.ones(4, 128),
        f"{name}.lora_up.weight": torch.ones(128, 4),
        f"{name}.alpha": torch.tensor(2.0),
    }
    read = reader.read(written(tmp_path, **weights))
    [(layer, low_rank)] = read["transformer"].items()
    factor = low_rank.ratio * low_rank.down[0, 0] * low_rank.up[0, 0]
    assert (layer, float(factor)) == ("transformer_blocks.0.attn.to_out.0", 0.5)


def test_an_encoder_that_is_offloaded_stays_so_when_an_adapter_is_read(
    adapters: Callable[[str], dict[str, AdapterConfig]],
) -> None:
    model = served("flux", adapters("flux"))
    encoder = load_stage("encode", model, EncoderConfig(offload="sequential"))
    hooked = [
        name for name, part in encoder._models["text_encoder_2"].named_modules() if hasattr(part, "_hf_hook")
    ]
    for scales in ((("a", 1.0),), ()):
        encoder.encode(asked(model, scales))
    parts = encoder._models["text_encoder_2"].named_modules()
    assert [name for name, part in parts if hasattr(part, "_hf_hook")] == hooked


def test_reading_leaves_the_models_that_serve_as_they_are(reader: AdapterReader, tmp_path: Path) -> None:
    before = dict(reader._skeleton("transformer").named_modules())
    reader.read(written(tmp_path, **pair(LAYER, 4, 128, 128)))
    assert dict(reader._skeleton("transformer").named_modules()) == before


class Store:
    """An AdapterStore whose adapters change one linear layer and take NUM_BYTES each."""

    def __init__(self, tmp_path: Path, reader: AdapterReader, max_bytes: int) -> None:
        layers = AdapterLayers({"transformer": reader._skeleton("transformer")}, torch.device("cpu"))
        self.store = AdapterStore(reader, layers, ["transformer"], max_bytes)
        self._source = written(tmp_path, **pair(LAYER, 4, 128, 128)).source
        self.loaded = lambda: self.store.names

    def named(self, name: str) -> list[ScaledAdapter]:
        return [ScaledAdapter(Adapter(name, self._source), 1.0)]


NUM_BYTES = 2 * 4 * 128 * 4


def test_the_least_recently_used_adapter_goes_first(reader: AdapterReader, tmp_path: Path) -> None:
    at = Store(tmp_path, reader, max_bytes=2 * NUM_BYTES)
    for name in ("a", "b", "a", "c"):
        with at.store.using(at.named(name)):
            pass
    assert at.loaded() == ["a", "c"]
    assert at.store.num_bytes == 2 * NUM_BYTES
    assert at.store.num_loads == 3


def test_an_adapter_in_use_stays_whatever_the_limit(reader: AdapterReader, tmp_path: Path) -> None:
    at = Store(tmp_path, reader, max_bytes=0)
    with (
        at.store.using(at.named("a")) as first,
        at.store.using(at.named("b")),
        at.store.using(at.named("a")) as again,
    ):
        assert first == again
    assert at.loaded() == []


def test_several_requests_at_once_load_an_adapter_once(reader: AdapterReader, tmp_path: Path) -> None:
    at = Store(tmp_path, reader, max_bytes=2**20)

    def use(_: int) -> Any:
        with at.store.using(at.named("a")) as applied:
            return applied

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(use, range(8)))) == 1
    assert at.store.num_loads == 1


def test_a_texts_adapter_is_part_of_what_the_encoder_remembers(
    adapters: Callable[[str], dict[str, AdapterConfig]],
) -> None:
    """Adapter b has no weights for text encoders, so its requests share the encodings made without adapters."""
    model = served("flux", adapters("flux"))
    encoder = load_stage("encode", model, EncoderConfig())
    for scales, forwards in (
        ((), 1),
        ((("a", 1.0),), 2),
        ((("b", 1.0),), 2),
        ((("a", 0.5),), 3),
        ((("a", 1.0),), 3),
    ):
        encoder.encode(asked(model, scales))
        assert encoder.num_forwards == forwards, scales


TECHNIQUES: dict[str, dict[str, Any]] = {
    "compiled blocks": {"compile": {"scope": "blocks", "backend": "eager"}},
    "model offload": {"offload": "model"},
    "group offload": {"offload": {"kind": "group", "level": "leaf"}},
    "sequential offload": {"offload": "sequential"},
    "a budget": {"vram_limit_gib": 0.004},
    "8-bit storage": {"layerwise_casting": "float8_e4m3fn"},
    "nf4": {"quantization": "nf4", "device": "gpu", "num_gpus": 1},
}
IN_OTHER_BITS = {"8-bit storage", "nf4"}
"""Techniques that draw another image than the plain pipeline, with or without adapters."""


@pytest.mark.parametrize(
    "technique",
    [pytest.param(name, marks=[pytest.mark.gpu] * ("num_gpus" in of)) for name, of in TECHNIQUES.items()],
)
def test_adapters_act_beside_what_keeps_the_weights_small(
    technique: str, adapters: Callable[[str], dict[str, AdapterConfig]]
) -> None:
    """With weights of fewer bits, an adapter moves the latents in the same direction as with the full weights."""
    model = served("flux", adapters("flux"))
    requests = [asked(model, scales) for scales in ((("b", 1.0),), ())]
    encodings = load_stage("encode", model, EncoderConfig()).encode(requests[1])
    stage = load_ranks(model, **TECHNIQUES[technique])
    try:
        drawn, bare = (denoise(stage, encodings, request).latents for request in requests)
    finally:
        stage.close()
    expected, plain = (draw_plain(model, request) for request in requests)
    if technique in IN_OTHER_BITS:
        moved, should = (drawn - bare).float().flatten(), (expected - plain).flatten()
        assert float(torch.cosine_similarity(moved, should, dim=0)) > 0.9
    else:
        for one, other in ((drawn, expected), (bare, plain)):
            np.testing.assert_allclose(
                one.numpy(), other.numpy(), atol=TOLERANCE * float(other.abs().max()), rtol=0
            )
