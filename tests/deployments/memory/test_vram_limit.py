"""A model under a budget computes what it computes without, and holds no more than the budget."""

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from deployments.answers import DecodeArguments
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.families import FAMILIES
from deployments.memory.vram_limit import VramLimit
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from tests.deployments.memory.tiny_request import build_request
from tests.thorough import usually

CPU = torch.device("cpu")
KIB = 1024


class Block(nn.Module):
    """A block with a weight of its own, used before and after its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16))
        self.register_buffer("shift", torch.randn(16))
        self.one, self.two = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale + self.two(self.one(x).relu())
        return x + self.get_buffer("shift")


class Model(nn.Module):
    """A model of four blocks between an embedding and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(32, 16), nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, fail_at: int | None = None) -> torch.Tensor:
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            if i == fail_at:
                raise KeyError(i)
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


IDS = torch.tensor([[1, 2, 3]])
TOTAL = sum(tensor.nbytes for tensor in (*Model().parameters(), *Model().buffers()))
LARGEST = nn.Linear(16, 64).weight.nbytes + 64 * 4
MUST_STAY = 32 * 16 * 4 + 4 * 2 * 16 * 4


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.mark.parametrize("limit", [0, MUST_STAY + LARGEST, TOTAL // 2, TOTAL - 1, TOTAL, 10 * TOTAL])
def test_a_model_computes_the_same_within_its_limit(model: Model, limit: int) -> None:
    expected = model(IDS)
    budget = VramLimit(model, limit_bytes=limit, device=CPU)
    for _ in range(3):
        assert torch.equal(model(IDS), expected)
    stats = budget.stats()
    assert stats.peak_bytes <= max(limit, MUST_STAY + LARGEST)
    assert (stats.num_streamed == 0) == (limit >= TOTAL)
    assert stats.kept_bytes + stats.streamed_bytes // 3 == TOTAL


@pytest.mark.parametrize("limit", range(MUST_STAY + LARGEST, TOTAL, KIB))
def test_what_may_be_kept_is_kept(limit: int) -> None:
    """The rest of the limit holds one layer at work, and is too small for another."""
    kept_bytes = VramLimit(Model(), limit_bytes=limit, device=CPU).stats().kept_bytes
    assert limit - 2 * LARGEST < kept_bytes <= limit - LARGEST


def test_what_is_kept_is_spread_along_the_model(model: Model) -> None:
    """It keeps every other layer, and not just the first two blocks."""
    layers = [layer for block in model.blocks for layer in (block.one, block.two)]  # type: ignore[union-attr]
    hosts = [layer.weight.data_ptr() for layer in layers]
    VramLimit(model, limit_bytes=MUST_STAY + 5 * LARGEST, device=CPU)
    model(IDS)
    is_kept = [layer.weight.data_ptr() != host for layer, host in zip(layers, hosts, strict=True)]
    assert sum(is_kept) == 4
    assert not any(one and other for one, other in pairwise(is_kept))


def test_an_exception_on_the_way_leaves_nothing_behind(model: Model) -> None:
    """A shard's forward ends with an exception at its cut."""
    expected = model(IDS)
    budget = VramLimit(model, limit_bytes=0, device=CPU)
    for _ in range(2):
        with pytest.raises(KeyError):
            model(IDS, fail_at=2)
    assert torch.equal(model(IDS), expected)
    assert budget.stats().peak_bytes <= MUST_STAY + LARGEST


def test_leaving_empties_the_device_and_the_next_forward_fills_it(model: Model) -> None:
    expected, addresses = model(IDS), {tensor.data_ptr() for tensor in model.state_dict().values()}
    budget = VramLimit(model, limit_bytes=TOTAL, device=CPU)
    model(IDS)
    assert not addresses & {tensor.data_ptr() for tensor in model.state_dict().values()}
    budget.unload()
    assert addresses == {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert torch.equal(model(IDS), expected)
    assert budget.stats().peak_bytes == TOTAL


def build_stage(family: str, **settings: Any) -> Any:
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    stage = load_stage("denoise", model, TransformerConfig(**settings))
    stage.connect(None, pytest.fail)
    return stage


@pytest.mark.slow
@pytest.mark.parametrize("casting", [{}, {"layerwise_casting": True}], ids=["plain", "fp8"])
@pytest.mark.parametrize("family", usually(FAMILIES, lambda family: family in ("flux", "wan")))
def test_every_family_draws_the_same_under_a_limit(family: str, casting: dict[str, Any]) -> None:
    request = build_request(family)
    tokens = 64 if FAMILIES[family].max_sequence_length else None
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    encoding = load_stage("encode", model, EncoderConfig(max_sequence_length=tokens))
    embeds = encoding.encode(request)

    def draw(stage: Any) -> torch.Tensor:
        latents: torch.Tensor = stage.denoise(stage.join(), embeds, request, on_step=lambda *_: None).latents
        stage.close()
        return latents

    whole = build_stage(family, **casting)
    expected = draw(whole)
    total = sum(whole.loaded.residency.stats().weights_bytes.values())
    for limit in (0, total // 2):
        stage = build_stage(family, vram_limit_gib=limit / 2**30, **casting)
        assert torch.equal(draw(stage), expected)
        [stats] = stage.loaded.residency.stats().vram_limits
        assert stats.num_streamed > 0
        assert limit == 0 or stats.peak_bytes <= limit


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_text_encoders_under_a_limit(family: str) -> None:
    model, tokens = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family), 64
    request = build_request(family)
    config = EncoderConfig(max_sequence_length=tokens)
    expected = load_stage("encode", model, config).encode(request)
    limited = load_stage("encode", model, EncoderConfig(max_sequence_length=tokens, vram_limit_gib=1e-4))
    for _ in range(2):
        pairs = zip(each_tensor(limited.encode(request)), each_tensor(expected), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_vae_under_a_limit(family: str) -> None:
    model, request = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family), build_request(family)
    shape = (1, 16, 8, 8) if family == "flux" else (1, 16, 2, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = load_stage("decode", model, VaeConfig()).decode(DecodeArguments.of(latents), request)
    frames = load_stage("decode", model, VaeConfig(vram_limit_gib=1e-4)).decode(
        DecodeArguments.of(latents), request
    )
    assert (frames == expected).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [0, 0.3, 0.8, 2])
def test_on_a_gpu_the_limit_holds_and_the_prediction_is_the_same(share: float) -> None:
    folder = fetch_checkpoint("tiny://flux", ())
    device = torch.device("cuda")
    transformer: Any = diffusers.FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    transformer.requires_grad_(False)
    config = DiffusionPipeline.load_config(folder)
    assert config["transformer"][1] == "FluxTransformer2DModel"
    inputs = {
        "hidden_states": torch.randn(1, 16, 64),
        "encoder_hidden_states": torch.randn(1, 16, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(16, 3),
        "return_dict": False,
    }
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    expected = transformer.to(device)(**on_device)[0].cpu()
    transformer.to("cpu")
    total = sum(tensor.nbytes for tensor in transformer.state_dict().values())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    budget = VramLimit(transformer, limit_bytes=int(share * total), device=device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        assert torch.equal(transformer(**inputs)[0].cpu(), expected)
    assert torch.cuda.memory_allocated() - before <= budget.stats().kept_bytes + 2**21
    # Active memory includes freed memory that other streams still use, so it may not be used again yet.
    peak = torch.cuda.memory_stats()["active_bytes.all.peak"] - before
    assert peak <= budget.stats().peak_bytes + 2**21


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_weights_may_leave_while_the_next_are_fetched() -> None:
    """The weights' memory is not used again before the copy into it is done."""
    device = torch.device("cuda")
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).requires_grad_(False)
    limit_bytes = 3 * sum(tensor.nbytes for tensor in model[0].parameters())
    budget = VramLimit(model, limit_bytes=limit_bytes, device=device)
    values = torch.randn(4, 256)
    expected = model(values)
    for _ in range(2):
        assert torch.equal(model(values), expected)
        budget.unload()
        torch.zeros(limit_bytes, dtype=torch.uint8, device=device)
