"""Names and weights of a denoiser's blocks."""

import pytest
from accelerate import init_empty_weights
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    VQModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from deployments.engine.blocks import block_bytes, block_names, shape_only_inputs
from deployments.memory.config import MemoryConfig
from deployments.memory.stored import as_stored, stored_bytes

GIB = 2**30
BF16 = MemoryConfig(dtype="bfloat16")


def on_meta(model_class: type[nn.Module], **config: object) -> nn.Module:
    with init_empty_weights():
        return model_class(**config)


def test_double_blocks_come_before_single_blocks() -> None:
    names = block_names(on_meta(FluxTransformer2DModel, num_layers=2, num_single_layers=1))
    assert names == ("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0")


def test_a_unet_is_down_blocks_mid_block_up_blocks() -> None:
    names = block_names(on_meta(UNet2DConditionModel))
    assert names[:1] + names[3:6] + names[8:] == (
        "down_blocks.0",
        "down_blocks.3",
        "mid_block",
        "up_blocks.0",
        "up_blocks.3",
    )


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"VQModel declares no blocks .* run it as one shard"):
        block_names(on_meta(VQModel))


def test_lists_of_blocks_side_by_side_are_refused() -> None:
    model = on_meta(WanVACETransformer3DModel, num_layers=1, vace_layers=[0])
    with pytest.raises(ValueError, match=r"its vace_blocks run beside its blocks; run it as one shard"):
        block_names(model)


def test_refiners_are_no_part_of_the_chain() -> None:
    model = on_meta(ZImageTransformer2DModel, n_layers=2, n_refiner_layers=1)
    assert block_names(model) == ("layers.0", "layers.1")


def test_what_runs_before_the_chain_weighs_on_the_first_shard() -> None:
    model = on_meta(ZImageTransformer2DModel, n_layers=2, n_refiner_layers=1)
    weight = block_bytes(model)
    front = sum(stored_bytes(part) for part in (model.noise_refiner, model.context_refiner))
    assert weight.blocks[0] == weight.blocks[1] + front
    assert weight.head + sum(weight.blocks) + weight.tail == stored_bytes(model)


def test_flux_dev_weighs_what_is_published() -> None:
    weight = block_bytes(as_stored(on_meta(FluxTransformer2DModel, guidance_embeds=True), BF16))
    assert weight.of_shard(0, 57) / GIB == pytest.approx(22.17, abs=0.01)
    assert weight.blocks[0] / weight.blocks[-1] == pytest.approx(2.4, abs=0.1)


def test_the_head_is_in_every_shard_and_the_tail_in_the_last() -> None:
    weight = block_bytes(on_meta(SD3Transformer2DModel, num_layers=3))
    parts = weight.of_shard(0, 1) + weight.of_shard(1, 3)
    assert parts == weight.of_shard(0, 3) + weight.head
    assert weight.of_shard(0, 1) == weight.head + weight.blocks[0]
    assert min(weight.head, weight.tail) > 0


def test_modules_kept_in_float32_count_four_bytes() -> None:
    model = on_meta(WanTransformer3DModel, num_layers=1)
    in_fp32, in_bf16 = block_bytes(model).blocks[0], block_bytes(as_stored(model, BF16)).blocks[0]
    assert in_fp32 / 2 < in_bf16 < in_fp32


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (on_meta(Flux2Transformer2DModel, num_layers=1, num_single_layers=1), {"hidden_states"}),
        (on_meta(UNet2DConditionModel), set()),
    ],
)
def test_only_a_transformers_latents_may_stay_behind(model: nn.Module, names: set[str]) -> None:
    assert shape_only_inputs(model) == names
