"""Shards of the six families compute what their whole models compute, on tiny checkpoints."""

import gc
import pickle
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deployments.checkpoints.source import fetch_checkpoint
from deployments.checkpoints.tiny.names import TINY_FAMILIES
from deployments.engine.blocks import block_bytes, block_names, build_skeleton, shape_only_inputs
from deployments.engine.cut import Boundary, Recorder, Stub
from deployments.engine.shard import Shard, load_shard
from deployments.memory.config import MemoryConfig
from deployments.memory.stored import as_stored
from tests.thorough import usually

MODELS = {
    "flux": (diffusers.FluxTransformer2DModel, "transformer", 8),
    "sd15": (diffusers.UNet2DConditionModel, "unet", 5),
    "sdxl": (diffusers.UNet2DConditionModel, "unet", 5),
    "sd3": (diffusers.SD3Transformer2DModel, "transformer", 4),
    "qwen-image": (diffusers.QwenImageTransformer2DModel, "transformer", 4),
    "wan": (diffusers.WanTransformer3DModel, "transformer", 4),
}
"""Class, subfolder and number of blocks of each family's denoiser."""

ALL_CUTS = [
    (family, cuts)
    for family, (_, _, num_blocks) in MODELS.items()
    for cuts in [*((0, cut, num_blocks) for cut in range(1, num_blocks)), (0, 1, num_blocks - 1, num_blocks)]
]
THREE_SHARDS = [(family, (0, 1, num_blocks - 1, num_blocks)) for family, (_, _, num_blocks) in MODELS.items()]

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoints() -> Path:
    """The folder that holds the tiny checkpoints, each under its family's name."""
    [folder] = {fetch_checkpoint(f"tiny://{family}", ()).parent for family in TINY_FAMILIES}
    return folder


def inputs_of(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Returns what the family's pipeline passes to its denoiser, for two samples of 64 x 64 pixels."""
    generator = torch.Generator().manual_seed(0)
    timestep = torch.full((2,), 700.0, dtype=dtype)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator).to(dtype)

    if family == "flux":
        return {
            "hidden_states": noise(16, 64),
            "encoder_hidden_states": noise(10, 64),
            "pooled_projections": noise(64),
            "timestep": timestep / 1000,
            "guidance": torch.full((2,), 3.5, dtype=dtype),
            "txt_ids": torch.zeros(10, 3),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        }
    if family == "qwen-image":
        return {
            "hidden_states": noise(16, 64),
            "encoder_hidden_states": noise(10, 64),
            "encoder_hidden_states_mask": None,
            "timestep": timestep / 1000,
            "img_shapes": [[(1, 4, 4)]] * 2,
        }
    if family == "wan":
        return {
            "hidden_states": noise(16, 2, 8, 8),
            "timestep": timestep,
            "encoder_hidden_states": noise(10, 64),
        }
    if family == "sd3":
        return {
            "hidden_states": noise(16, 8, 8),
            "timestep": timestep,
            "encoder_hidden_states": noise(10, 192),
            "pooled_projections": noise(128),
        }
    unet = {"sample": noise(4, 8, 8), "timestep": torch.tensor(700)}
    if family == "sd15":
        return unet | {"encoder_hidden_states": noise(77, 64)}
    added = {"text_embeds": noise(64), "time_ids": noise(6)}
    return unet | {"encoder_hidden_states": noise(77, 128), "added_cond_kwargs": added}


def load(
    checkpoints: Path,
    family: str,
    blocks: tuple[int, int] | None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Shard:
    model_class, subfolder, _ = MODELS[family]
    return load_shard(model_class, checkpoints / family, subfolder, blocks=blocks, dtype=dtype, **options)


def load_chain(checkpoints: Path, family: str, cuts: Sequence[int], **options: Any) -> list[Shard]:
    return [load(checkpoints, family, blocks, **options) for blocks in pairwise(cuts)]


def run_chain(
    shards: Sequence[Shard],
    inputs: dict[str, Any],
    carry: Callable[[Boundary], Boundary] = lambda boundary: boundary,
) -> torch.Tensor:
    """Runs the shards one after another; shards after the first get zeros for latents where that is enough."""
    boundary: Boundary | None = None
    for shard in shards[:-1]:
        crossed = shard.run(for_shard(shard, inputs), boundary)
        assert isinstance(crossed, dict)
        boundary = carry(crossed)
    output = shards[-1].run(for_shard(shards[-1], inputs), boundary)
    assert isinstance(output, tuple)
    [prediction] = output
    assert isinstance(prediction, torch.Tensor)
    return prediction


def for_shard(shard: Shard, inputs: dict[str, Any]) -> dict[str, Any]:
    names = shape_only_inputs(shard.model) if shard.blocks and shard.blocks[0] > 0 else ()
    return inputs | {name: torch.zeros_like(inputs[name]) for name in names}


@pytest.fixture(scope="module")
def whole(checkpoints: Path) -> Callable[[str, torch.dtype], torch.Tensor]:
    """Returns a function that computes the whole model's prediction in plain diffusers."""

    @cache
    def predict(family: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        model_class, subfolder, _ = MODELS[family]
        model = model_class.from_pretrained(checkpoints / family, subfolder=subfolder, dtype=dtype)
        with torch.no_grad():
            prediction: torch.Tensor = model(**inputs_of(family, dtype)).sample
        assert prediction.std() > 0.01
        return prediction

    return predict


@pytest.mark.parametrize(
    ("family", "cuts"),
    usually(ALL_CUTS, lambda of: of in THREE_SHARDS or of[0] in {"flux", "sdxl"}),
)
def test_shards_predict_bit_for_bit_what_the_whole_model_does(
    checkpoints: Path, whole: Callable[[str], torch.Tensor], family: str, cuts: tuple[int, ...]
) -> None:
    prediction = run_chain(load_chain(checkpoints, family, cuts), inputs_of(family))
    assert torch.equal(prediction, whole(family))


@pytest.mark.parametrize(("family", "cuts"), THREE_SHARDS)
def test_shards_in_bfloat16_equal_the_whole_in_bfloat16(
    checkpoints: Path,
    whole: Callable[[str, torch.dtype], torch.Tensor],
    family: str,
    cuts: tuple[int, ...],
) -> None:
    shards = load_chain(checkpoints, family, cuts, dtype=torch.bfloat16)
    prediction = run_chain(shards, inputs_of(family, torch.bfloat16))
    assert prediction.dtype is torch.bfloat16
    assert torch.equal(prediction, whole(family, torch.bfloat16))


def test_a_lone_shard_is_the_untouched_class(checkpoints: Path, whole: Callable[[str], torch.Tensor]) -> None:
    shard = load(checkpoints, "flux", blocks=None)
    assert type(shard.model) is diffusers.FluxTransformer2DModel
    assert not any(isinstance(module, Stub | Recorder) for module in shard.model.modules())
    assert shard.blocks is None
    assert torch.equal(run_chain([shard], inputs_of("flux")), whole("flux"))


@pytest.mark.parametrize(("family", "cuts"), THREE_SHARDS)
def test_a_shard_holds_its_own_blocks_and_the_last_one_the_tail(
    checkpoints: Path, family: str, cuts: tuple[int, ...]
) -> None:
    skeleton = build_skeleton(MODELS[family][0], checkpoints / family, MODELS[family][1])
    names = block_names(skeleton)
    for (start, end), shard in zip(pairwise(cuts), load_chain(checkpoints, family, cuts), strict=True):
        held = {name for name, _ in shard.model.named_parameters()}
        for index, block in enumerate(names):
            own = {f"{block}.{name}" for name, _ in skeleton.get_submodule(block).named_parameters()}
            assert held & own == (own if start <= index < end else set())
        is_last = end == len(names)
        assert any(name.startswith(("proj_out.", "conv_out.")) for name in held) is is_last
        assert not any(parameter.is_meta for parameter in shard.model.parameters())


@pytest.mark.parametrize(("family", "cuts"), THREE_SHARDS)
def test_shards_weigh_what_block_bytes_says(checkpoints: Path, family: str, cuts: tuple[int, ...]) -> None:
    """Together the shards hold the whole model and one more head for each cut."""
    skeleton = build_skeleton(MODELS[family][0], checkpoints / family, MODELS[family][1])
    weight = block_bytes(as_stored(skeleton, MemoryConfig(dtype="bfloat16")))
    for blocks, shard in zip(
        pairwise(cuts), load_chain(checkpoints, family, cuts, dtype=torch.bfloat16), strict=True
    ):
        loaded = sum(tensor.nbytes for tensor in shard.model.state_dict().values())
        assert loaded == weight.of_shard(*blocks)


@pytest.mark.parametrize(("family", "num_names"), [("flux", 1), ("wan", 1), ("sdxl", 0)])
def test_only_a_transformers_later_shards_do_without_latents(
    checkpoints: Path, family: str, num_names: int
) -> None:
    skeleton = build_skeleton(MODELS[family][0], checkpoints / family, MODELS[family][1])
    assert len(shape_only_inputs(skeleton)) == num_names


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_a_boundary_survives_pickling(
    checkpoints: Path, whole: Callable[[str], torch.Tensor], family: str
) -> None:
    shards = load_chain(checkpoints, family, (0, 2, MODELS[family][2]))
    prediction = run_chain(shards, inputs_of(family), carry=lambda boundary: pickle.loads(pickle.dumps(boundary)))
    assert torch.equal(prediction, whole(family))


def test_a_transformers_boundary_is_the_last_blocks_output_alone(checkpoints: Path) -> None:
    boundary = load(checkpoints, "flux", (0, 6)).run(inputs_of("flux"))
    assert isinstance(boundary, dict)
    assert list(boundary) == ["single_transformer_blocks.1"]
    text, image = boundary["single_transformer_blocks.1"]
    assert isinstance(text, torch.Tensor)
    assert isinstance(image, torch.Tensor)
    assert (text.shape, image.shape) == ((2, 10, 128), (2, 16, 128))


def test_pairs_before_single_tensors_survive_a_cut(tmp_path: Path) -> None:
    """Flux 2 joins the pair that its double blocks return, so the stub of such a block must return a pair.

    The input has one sample, because two would unpack as a pair by chance.
    """
    torch.manual_seed(0)
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
    )
    model.save_pretrained(tmp_path / "transformer")
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 10, 32),
        "timestep": torch.full((1,), 0.7),
        "guidance": torch.full((1,), 3.0),
        "img_ids": torch.zeros(1, 16, 4),
        "txt_ids": torch.zeros(1, 10, 4),
    }
    shards = [
        load_shard(type(model), tmp_path, "transformer", blocks=blocks, dtype=torch.float32)
        for blocks in [(0, 2), (2, 3), (3, 4)]
    ]
    with torch.no_grad():
        assert torch.equal(run_chain(shards, inputs), model.eval()(**inputs).sample)


@pytest.fixture
def edited(checkpoints: Path, tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that copies the Wan checkpoint with one key added or dropped."""

    def edit(*, add: str | None = None, drop: str | None = None) -> Path:
        folder = tmp_path / "wan" / "transformer"
        folder.mkdir(parents=True)
        source = checkpoints / "wan" / "transformer"
        weights = load_file(source / WEIGHTS)
        if drop is not None:
            del weights[drop]
        if add is not None:
            weights[add] = torch.ones(1)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / "config.json").write_text((source / "config.json").read_text())
        return tmp_path

    return edit


@pytest.mark.parametrize("blocks", [None, (0, 2), (2, 4)])
def test_a_key_of_no_shard_fails_every_shard(edited: Callable[..., Path], blocks: tuple[int, int] | None) -> None:
    with pytest.raises(ValueError, match=r"has weights that no shard .* reads: blocks\.4\.attn1\.bias;"):
        load(edited(add="blocks.4.attn1.bias"), "wan", blocks)


def test_a_key_no_block_knows_fails_the_shard_that_has_the_block(edited: Callable[..., Path]) -> None:
    root = edited(add="blocks.3.bogus")
    load(root, "wan", (0, 2))
    with pytest.raises(ValueError, match=r"no shard .* reads: blocks\.3\.bogus;"):
        load(root, "wan", (2, 4))


def test_a_missing_key_fails_the_shard_that_needs_it_by_name(edited: Callable[..., Path]) -> None:
    root = edited(drop="proj_out.bias")
    load(root, "wan", (0, 2))
    with pytest.raises(ValueError, match=r"lacks weights .* needs: proj_out\.bias; .* fetch the checkpoint"):
        load(root, "wan", (2, 4))


@pytest.mark.parametrize("blocks", [(0, 5), (2, 2), (-1, 2)])
def test_a_range_beyond_the_blocks_is_refused(checkpoints: Path, blocks: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="it has 4 blocks, so 0 <= start < end <= 4"):
        load(checkpoints, "wan", blocks, dtype=torch.bfloat16)
    assert torch.get_default_dtype() is torch.float32


def test_a_shard_without_its_boundary_says_what_it_needs(checkpoints: Path) -> None:
    shard = load(checkpoints, "wan", (2, 4))
    with pytest.raises(ValueError, match=r"starts at blocks\.2 needs .* output of blocks\.1, got none"):
        shard.run(inputs_of("wan"))
    with pytest.raises(ValueError, match=r"got one with blocks\.0;"):
        shard.run(inputs_of("wan"), {"blocks.0": torch.zeros(1)})


def test_the_first_shard_takes_no_boundary(checkpoints: Path) -> None:
    with pytest.raises(ValueError, match="starts from the latents"):
        load(checkpoints, "wan", (0, 2)).run(inputs_of("wan"), {"blocks.0": torch.zeros(1)})


def test_a_skipped_block_is_an_error_not_a_wrong_picture(checkpoints: Path) -> None:
    shard = load(checkpoints, "sd3", (0, 2))
    with pytest.raises(RuntimeError, match=r"ends at transformer_blocks\.1, which was not"):
        shard.run(inputs_of("sd3") | {"skip_layers": [1]})


def test_an_error_inside_a_block_leaves_no_state_behind(
    checkpoints: Path, whole: Callable[[str], torch.Tensor]
) -> None:
    shards = load_chain(checkpoints, "sdxl", (0, 2, 5))
    block = shards[0].model.get_submodule("down_blocks.1")

    def fail(*_: Any) -> None:
        raise ArithmeticError("overflow")

    hook = block.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="overflow"):
        shards[0].run(inputs_of("sdxl"))
    hook.remove()
    assert shards[0].model.get_submodule("down_blocks.1") is block
    assert not any(isinstance(module, Recorder) for module in shards[0].model.modules())
    assert torch.is_grad_enabled()
    assert torch.equal(run_chain(shards, inputs_of("sdxl")), whole("sdxl"))


def test_a_run_keeps_no_tensor_alive(checkpoints: Path) -> None:
    shards = load_chain(checkpoints, "flux", (0, 3, 8))
    gc.disable()  # a reference cycle would keep activations on the GPU until the next collection
    try:
        boundary = shards[0].run(inputs_of("flux"))
        assert isinstance(boundary, dict)
        crossed = [weakref.ref(output) for output in boundary["transformer_blocks.2"]]
        shards[1].run(inputs_of("flux"), boundary)
        del boundary
        assert [reference() for reference in crossed] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(("family", "cuts"), THREE_SHARDS)
def test_shards_compose_with_layerwise_casting(checkpoints: Path, family: str, cuts: tuple[int, ...]) -> None:
    def cast(model: Any) -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    assert_prepared_shards_equal_a_prepared_whole(checkpoints, family, cuts, cast, torch.bfloat16)


def test_shards_compose_with_compiled_blocks(checkpoints: Path) -> None:
    def compile_blocks(model: Any) -> None:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)

    assert_prepared_shards_equal_a_prepared_whole(checkpoints, "wan", (0, 1, 4), compile_blocks, torch.float32)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_shards_compose_with_group_offloading(checkpoints: Path, offload_type: str) -> None:
    """Groups have two blocks, so that one group holds a stub and a block."""

    def offload(model: Any) -> None:
        cpu = torch.device("cpu")
        num_blocks = 2 if offload_type == "block_level" else None
        model.enable_group_offload(cpu, cpu, offload_type=offload_type, num_blocks_per_group=num_blocks)

    assert_prepared_shards_equal_a_prepared_whole(checkpoints, "flux", (0, 3, 8), offload, torch.float32)


def assert_prepared_shards_equal_a_prepared_whole(
    checkpoints: Path,
    family: str,
    cuts: Sequence[int],
    prepare: Callable[[nn.Module], None],
    dtype: torch.dtype,
) -> None:
    shards = load_chain(checkpoints, family, cuts, dtype=dtype)
    reference = load(checkpoints, family, None, dtype)
    for shard in [*shards, reference]:
        prepare(shard.model)
    inputs = inputs_of(family, dtype)
    assert torch.equal(run_chain(shards, inputs), run_chain([reference], inputs))
