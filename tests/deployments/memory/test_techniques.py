"""Every technique draws what plain diffusers draws with the same technique, and so do pairs of techniques.

Without --thorough only some of the allowed pairs run, because tracing hooks takes dynamo minutes. To run all of
them: `pytest tests/deployments/memory --thorough -k every_allowed_pair`.
"""

import shutil
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from deployments.answers import DecodeArguments
from deployments.checkpoints.components import denoiser_names, read_index
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.memory.conflicts import find_conflict
from deployments.memory.movable import make_movable
from deployments.request import GenerationRequest
from deployments.stages import load_stage
from deployments.stages.tensors import each_tensor
from tests.conftest import decoded_by
from tests.deployments.memory.tiny_request import NUM_STEPS, PROMPT, build_request
from tests.thorough import usually
from tests.tiny_models import EXPERTS, family_of, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quantize_on_cpu", "fresh_torch", "own_leases")]

TECHNIQUES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "nf4": {"quantization": "nf4"},
    "fp4": {"quantization": {"kind": "fp4", "double_quant": True}},
    "int8": {"quantization": "int8"},
    "fp8": {"layerwise_casting": True},
    "model": {"offload": "model"},
    "sequential": {"offload": "sequential"},
    "leaves": {"offload": "group"},
    "blocks": {"offload": {"kind": "group", "level": "block"}},
    "files": {"offload": {"kind": "group", "folder": "/tmp"}},
    "disk": {"offload": "disk"},
    "limit": {"vram_limit_gib": 1e-4},
    "mapped": {"vram_limit_gib": 1e-4, "host_copy": "files", "dtype": "bfloat16"},  # their dtype on disk
    "time sharing": {"time_sharing": True},
    "compile": {"compile": {"backend": "eager"}},
    "fullgraph": {"compile": {"backend": "eager", "fullgraph": True}},
    "compile model": {"compile": {"scope": "model", "backend": "eager"}},
    "trace": {"trace": True},
    "channels_last": {"channels_last": True},
    "math": {"attention_backend": "_native_math"},
}
EXACT = {
    "model",
    "sequential",
    "leaves",
    "blocks",
    "files",
    "disk",
    "limit",
    "mapped",
    "time sharing",
    "compile",
    "fullgraph",
    "compile model",
    "trace",
}
BF16 = {"bf16", "mapped"}
WEIGHTS = {"nf4", "fp4", "int8", "fp8"}
"""Techniques that change the weights; diffusers changes them alike."""
TOLERANCE, BF16_TOLERANCE = 5e-5, 0.1
"""Tolerances where another kernel sums in another order: attention backends, channels_last. Latents reach 3."""


@pytest.fixture
def fresh_torch() -> Iterator[None]:
    """Resets compiled graphs and the attention backend, which belong to the process and not to the model."""
    torch._dynamo.reset()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def config(technique: str) -> TransformerConfig:
    return TransformerConfig(**TECHNIQUES[technique])


def draw(family: str, model: ModelConfig | None = None, **settings: Any) -> torch.Tensor:
    """Returns the latents of the denoise stage."""
    request = build_request(family)
    model = model or tiny_model(family)
    stage = load_stage("denoise", model, TransformerConfig(**settings))
    stage.connect(None, pytest.fail)
    try:
        latents: torch.Tensor = stage.denoise(
            stage.join(), embeds(family), request, on_step=lambda *_: None
        ).latents
    finally:
        stage.close()
    return latents


@cache
def embeds(family: str) -> Any:
    return load_stage("encode", tiny_model(family), build_encoder_config(family)).encode(build_request(family))


def prompt_embeds(family: str) -> dict[str, torch.Tensor]:
    """Returns the embeddings under the argument names of the pipeline's call."""
    names = {
        "flux": ("prompt_embeds", "pooled_prompt_embeds"),
        "qwen-image": ("prompt_embeds", "prompt_embeds_mask"),
    }.get(
        family,
        ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    )
    made = dict(embeds(family))["encode_prompt"]
    return {name: value for name, value in zip(names, made, strict=False) if value is not None}


def build_encoder_config(family: str, **settings: Any) -> EncoderConfig:
    tokens = 64 if family_of(family).max_sequence_length else None
    return EncoderConfig(max_sequence_length=tokens, **settings)


@cache
def plain_latents(family: str, technique: str | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns the latents of diffusers' own pipeline, with its own option for the technique.

    technique: None for no technique.
    """
    folder = fetch_checkpoint(f"tiny://{family}", ())
    four_bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
    quantization = {
        "nf4": lambda: diffusers.BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **four_bits),
        "fp4": lambda: diffusers.BitsAndBytesConfig(
            bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True, **four_bits
        ),
        "int8": lambda: diffusers.BitsAndBytesConfig(load_in_8bit=True),
    }.get(technique or "", lambda: None)()
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    for name in denoisers(family):
        kind = type(getattr(pipe, name))
        denoiser = kind.from_pretrained(folder, subfolder=name, dtype=dtype, quantization_config=quantization)
        if technique == "fp8":
            denoiser.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=dtype)
        setattr(pipe, name, denoiser)
    pipe.set_progress_bar_config(disable=True)
    request = build_request(family)
    settings: dict[str, Any] = {"prompt": PROMPT}
    if dtype != torch.float32:  # only the denoiser has it, so the pipeline must not see its text encoders
        pipe.register_modules(**{part: None for part in pipe.components if part.startswith("text_encoder")})
        settings = {key: value.to(dtype) for key, value in prompt_embeds(family).items()}
    if request.true_cfg_scale is not None:
        settings["true_cfg_scale"] = request.true_cfg_scale
    if family_of(family).media == "video":
        settings["num_frames"] = 5
    if family_of(family).max_sequence_length is not None:
        settings["max_sequence_length"] = 64
    pipe.vae.to(dtype)
    with decoded_by(pipe) as decoded:
        pipe(
            width=64,
            height=64,
            num_inference_steps=NUM_STEPS,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(7),
            **settings,
        )
    return decoded[0]


def expected(family: str, techniques: tuple[str, ...]) -> torch.Tensor:
    """Returns the expected latents: they depend only on techniques that change the weights, and on the dtype."""
    dtype = torch.bfloat16 if set(techniques) & BF16 else torch.float32
    return plain_latents(family, next((name for name in techniques if name in WEIGHTS), None), dtype)


def denoisers(family: str) -> tuple[str, ...]:
    return denoiser_names(read_index(fetch_checkpoint(f"tiny://{family}", ())))


def suits(family: str, technique: str) -> bool:
    if technique == "math":
        return "unet" not in denoisers(family) and family != "sd3"
    return technique not in {"trace", "channels_last"} or "unet" in denoisers(family)


def singles(*families: str) -> list[Any]:
    return [(family, (name,)) for family in families for name in TECHNIQUES if suits(family, name)]


def all_pairs(family: str) -> list[Any]:
    """Returns every allowed pair of techniques that suits the family."""
    return [
        (family, names)
        for names in combinations(TECHNIQUES, 2)
        if all(suits(family, name) for name in names) and is_allowed(names)
    ]


def is_allowed(names: tuple[str, ...]) -> bool:
    keys = [key for name in names for key in TECHNIQUES[name]]
    if len(keys) != len(set(keys)):
        return False  # two values of one key
    settings = {key: value for name in names for key, value in TECHNIQUES[name].items()}
    try:
        return find_conflict(TransformerConfig(**settings)) is None
    except ValueError:
        return False


PAIRS = (
    ("flux", ("nf4", "fullgraph")),
    ("flux", ("nf4", "model")),
    ("flux", ("int8", "model")),
    ("flux", ("fp8", "leaves")),
    ("flux", ("fp8", "math")),
    ("sdxl", ("trace", "channels_last")),
)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        *singles("flux"),
        *usually(singles("sdxl"), lambda of: {*of[1]} <= {"blocks", "trace", "channels_last"}),
        *usually(
            [
                (family, (name,))
                for family in ("qwen-image", "wan")
                for name in ("nf4", "fp8", "blocks", "compile")
            ],
            lambda of: of == ("wan", ("blocks",)),
        ),
        *usually(singles(EXPERTS), lambda of: {*of[1]} <= {"nf4", "leaves", "limit", "time sharing"}),
        *usually(PAIRS, lambda of: of[1] != ("nf4", "fullgraph")),
    ],
    ids=str,
)
def test_the_denoiser_draws_what_diffusers_draws_with_the_same_techniques(
    family: str, names: tuple[str, ...]
) -> None:
    compare_with_diffusers(family, names)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("pair", [*all_pairs("flux"), *all_pairs("sdxl")], ids=str)
def test_every_allowed_pair_draws_what_diffusers_draws(pair: tuple[str, tuple[str, ...]]) -> None:
    compare_with_diffusers(*pair)


def compare_with_diffusers(family: str, names: tuple[str, ...]) -> None:
    settings = {key: value for name in names for key, value in TECHNIQUES[name].items()}
    latents, wanted = draw(family, **settings), expected(family, names)
    if set(names) <= EXACT | WEIGHTS | BF16:
        assert torch.equal(latents, wanted)
    elif "int8" in names:  # its rounding amplifies an activation's last bit to a step of 8-bit weights
        assert (latents - wanted).abs().max() < 0.2
    else:
        tolerance = BF16_TOLERANCE if set(names) & BF16 else TOLERANCE
        torch.testing.assert_close(latents, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("technique", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("family", ["flux", EXPERTS])
def test_what_changes_the_weights_changes_the_picture(family: str, technique: str) -> None:
    """Otherwise the tests above could not tell the techniques apart."""
    difference = (plain_latents(family, technique) - plain_latents(family, None)).abs().max()
    assert difference > 1e-2


def test_one_of_two_denoisers_alone_may_be_quantised() -> None:
    stage = load_stage(
        "denoise",
        tiny_model(EXPERTS),
        TransformerConfig(quantization={"kind": "nf4", "components": ["transformer_2"]}),
    )
    dtypes = [{p.dtype for p in shard.model.parameters()} for shard in stage.loaded.shards.values()]
    assert [torch.uint8 in found for found in dtypes] == [False, True]
    with pytest.raises(ValueError, match=r"this stage has no text_encoder; it has transformer, transformer_2"):
        load_stage(
            "denoise", tiny_model(EXPERTS), TransformerConfig(quantization={"components": ["text_encoder"]})
        )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_that_is_stored_quantised_needs_no_config(kind: str, tmp_path: Path) -> None:
    """It conflicts with the same techniques as a config with this quantization."""
    folder = tmp_path / "quantised"
    shutil.copytree(fetch_checkpoint("tiny://flux", ()), folder)
    stage = load_stage("denoise", ModelConfig(name="m", checkpoint=str(folder), family="flux"), config(kind))
    shutil.rmtree(folder / "transformer")
    stage.loaded.shards["transformer"].model.save_pretrained(folder / "transformer")
    model = ModelConfig(name="m", checkpoint=str(folder), family="flux")
    assert torch.equal(draw("flux", model), plain_latents("flux", kind))
    assert not load_stage("denoise", model, TransformerConfig()).loaded.residency.is_untouched
    with pytest.raises(ValueError, match="transformer is stored quantised, and quantization and vram_limit_gib"):
        draw("flux", model, vram_limit_gib=1)


@pytest.mark.parametrize("has_run", [False, True])
def test_an_8_bit_model_that_moves_takes_all_its_layers_hold_along(has_run: bool) -> None:
    """Otherwise weights that leave a GPU would stay there. Here another place in memory stands for a device."""
    stage = load_stage("denoise", ModelConfig(name="m", checkpoint="tiny://flux", family="flux"), config("int8"))
    stage.connect(None, pytest.fail)
    model, request = stage.loaded.shards["transformer"].model, build_request("flux")
    if has_run:
        stage.denoise(stage.join(), embeds("flux"), request, on_step=lambda *_: None)
    make_movable(model)
    before = held_by_8_bit_layers(model)
    model._apply(torch.clone)
    after = held_by_8_bit_layers(model)
    assert not {tensor.data_ptr() for tensor in before} & {tensor.data_ptr() for tensor in after}
    latents = stage.denoise(stage.join(), embeds("flux"), request, on_step=lambda *_: None).latents
    assert torch.equal(latents, plain_latents("flux", "int8"))
    stage.close()


def held_by_8_bit_layers(model: torch.nn.Module) -> list[torch.Tensor]:
    layers = [layer for layer in model.modules() if isinstance(layer, Linear8bitLt)]
    assert layers
    held = [tensor for layer in layers for at in (layer.state, layer.weight) for tensor in (at.CB, at.SCB)]
    return [tensor.data for tensor in (*held, *(layer.weight for layer in layers)) if tensor is not None]


@pytest.mark.parametrize(
    ("settings", "ratio"),
    [({"quantization": "nf4"}, 0.25), ({"quantization": "int8"}, 0.4), ({"layerwise_casting": True}, 0.5)],
)
def test_it_saves_memory(settings: dict[str, Any], ratio: float) -> None:
    """Compares the bytes held, as status reports them, with those of float32."""
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    held = []
    for config in (TransformerConfig(**settings), TransformerConfig()):
        stage = load_stage("denoise", model, config)
        held.append(sum(stage.loaded.residency.stats().weights_bytes.values()))
    assert held[0] < ratio * held[1]


@pytest.mark.parametrize("shards", [2])
@pytest.mark.parametrize("technique", ["nf4", "int8", "fp8"])
def test_a_shard_quantised_holds_what_the_whole_holds(technique: str, shards: int) -> None:
    """A shard reads only its blocks and quantises them alike: the state of its blocks is equal, key by key."""
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    whole = load_stage("denoise", model, TransformerConfig(**TECHNIQUES[technique]))
    state = whole.loaded.shards["transformer"].model.state_dict()
    part = load_stage("denoise", model, TransformerConfig(shards=shards, **TECHNIQUES[technique]))
    part_state = part.loaded.shards["transformer"].model.state_dict()
    assert 0 < len(part_state) < len(state)
    for key, value in part_state.items():
        assert torch.equal(value.float(), state[key].float()), key


@pytest.mark.parametrize(
    "settings",
    [
        {"offload": "model"},
        {"offload": "sequential"},
        {"offload": "group"},
        {"offload": "disk"},
        {"compile": {"backend": "eager"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", usually(["flux", "qwen-image", "sd15"], "flux".__eq__))
def test_the_encoder_gives_the_same_embeddings(family: str, settings: dict[str, Any]) -> None:
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    stage = load_stage("encode", model, build_encoder_config(family, **settings))
    for _ in range(2):
        got = list(each_tensor(stage.encode(build_request(family))))
        torch.testing.assert_close(got, list(each_tensor(embeds(family))), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("components", [None, ("text_encoder_2",)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_encoder_quantises_the_models_it_is_told_to(kind: str, components: tuple[str, ...] | None) -> None:
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    config = build_encoder_config("flux", quantization={"kind": kind, "components": components})
    stage = load_stage("encode", model, config)
    got, got_pooled, _ = dict(stage.encode(build_request("flux")))["encode_prompt"]
    whole, whole_pooled, _ = dict(embeds("flux"))["encode_prompt"]
    assert not torch.equal(got, whole)  # from T5
    assert torch.equal(got_pooled, whole_pooled) == (components is not None)
    torch.testing.assert_close(got, whole, atol=0.5, rtol=0.5)


def test_an_unknown_component_is_named() -> None:
    model = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
    config = build_encoder_config("flux", quantization={"kind": "nf4", "components": ["text_encoder_3"]})
    with pytest.raises(ValueError, match="this stage has no text_encoder_3; it has text_encoder, text_encoder_2"):
        load_stage("encode", model, config)


@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_groups_in_files_are_refused_for_encoders_whose_layers_share_a_weight(family: str, tmp_path: Path) -> None:
    """diffusers would silently give wrong embeddings: T5's two embeddings are one weight in two groups."""
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    config = EncoderConfig.model_validate({"offload": {"kind": "group", "folder": str(tmp_path)}})
    with pytest.raises(ValueError, match=r"are one weight.*offload: disk"):
        load_stage("encode", model, config)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("flux", {"trace": True}, "trace is for UNets"),
        ("flux", {"channels_last": True}, "has none"),
        ("sdxl", {"attention_backend": "native"}, "always uses torch's native attention"),
        ("flux", {"attention_backend": "flash"}, "flash-attn"),
        ("flux", {"attention_backend": "flush"}, "must be one of"),
        ("flux", {"offload": {"kind": "group", "use_stream": True}}, "use_stream needs a GPU"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_at_start(
    family: str, settings: dict[str, Any], message: str
) -> None:
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    with pytest.raises(ValueError, match=message):
        load_stage("denoise", model, TransformerConfig(**settings))


@pytest.mark.parametrize("family", ["flux", "wan"])
@pytest.mark.parametrize(
    "settings",
    [
        {"slicing": True},
        {"channels_last": True},
        {"offload": "model"},
        {"offload": "sequential"},
        {"offload": "group"},
        {"tiling": {"tile_size": 64}},
    ],
    ids=str,
)
def test_the_vae_decodes_the_same_pixels(family: str, settings: dict[str, Any]) -> None:
    """An image of a single tile is not tiled."""
    model, request = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family), build_request(family)
    latents = plain_latents(family, None)
    whole = load_stage("decode", model, VaeConfig()).decode(DecodeArguments.of(latents), request)
    stage = load_stage("decode", model, VaeConfig(**settings))
    frames = stage.decode(DecodeArguments.of(latents), request)
    assert abs(frames.astype(int) - whole.astype(int)).max() <= 1


def test_the_vae_in_fp8_decodes_what_diffusers_decodes_in_fp8() -> None:
    model, request = ModelConfig(name="tiny", checkpoint="tiny://sd15", family="sd15"), build_request("sd15")
    latents = plain_latents("sd15", None)
    vae: Any = diffusers.AutoencoderKL.from_pretrained(fetch_checkpoint("tiny://sd15", ()), subfolder="vae")
    vae.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        pixels = vae.decode(latents).sample
    frames = load_stage("decode", model, VaeConfig(layerwise_casting=True)).decode(
        DecodeArguments.of(latents), request
    )
    expected_frames = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert torch.equal(torch.from_numpy(frames).float(), expected_frames)


@pytest.mark.parametrize("overlap", [0.25, 0.6])
@pytest.mark.parametrize("family", usually(["flux", "sd15", "wan", "qwen-image"], {"flux", "wan"}.__contains__))
def test_tiles_make_the_whole_picture_without_seams(family: str, overlap: float) -> None:
    """The result has the image's shape; adjacent columns differ no more where tiles meet than elsewhere."""
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    request = build_request(family)
    request = GenerationRequest(**(vars(request) | {"width": 176, "height": 144}))
    frames = 2 if family == "wan" else 1
    latents = torch.randn(1, 16 if family != "sd15" else 4, 144 // 8, 176 // 8).mul(0.1)
    if family in {"wan", "qwen-image"}:
        latents = latents.unsqueeze(2).repeat(1, 1, frames, 1, 1)
    stage = load_stage("decode", model, VaeConfig(tiling={"tile_size": 64, "overlap": overlap}))
    tiled = stage.decode(DecodeArguments.of(latents), request).astype(int)
    assert tiled.shape[1:] == (144, 176, 3)
    steps = abs(tiled[:, :, 1:] - tiled[:, :, :-1]).mean(axis=(0, 1, 3))
    assert steps.max() < 4 * steps.mean() + 1
