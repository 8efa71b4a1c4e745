"""Signatures keep apart what must not merge; merging gives every request what it would get alone."""

from pathlib import Path
from typing import Any

import diffusers
import torch

from deployments.checkpoints.source import fetch_checkpoint
from deployments.engine.merge import Merger, num_samples, num_tokens, split


def flux_inputs(height: int, width: int, seed: int = 0, text: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(height * width) // width
    ids = torch.stack([rows * 0, rows, torch.arange(height * width) % width], dim=1).float()
    return {
        "hidden_states": torch.randn(1, height * width, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 64, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "timestep": torch.tensor([0.1 * (seed + 1)]),
        "guidance": torch.tensor([3.5 + seed]),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "joint_attention_kwargs": {},
    }


def qwen_inputs(text: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 16, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 64, generator=generator),
        "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.1 * (seed + 1)]),
        "guidance": None,
        "img_shapes": [[(1, 4, 4)]],
        "attention_kwargs": {},
    }


def load(family: str, name: str = "transformer") -> Any:
    folder: Path = fetch_checkpoint(f"tiny://{family}", (name,))
    kind = {"flux": "FluxTransformer2DModel", "qwen-image": "QwenImageTransformer2DModel"}[family]
    return getattr(diffusers, kind).from_pretrained(folder, subfolder=name).eval()


def test_requests_of_one_resolution_have_one_signature() -> None:
    merger = Merger("FluxTransformer2DModel")
    assert merger.signature(flux_inputs(4, 4, 0)) == merger.signature(flux_inputs(4, 4, 1))


def test_portrait_and_landscape_never_merge_though_their_shapes_are_equal() -> None:
    merger = Merger("FluxTransformer2DModel")
    assert merger.signature(flux_inputs(2, 8)) != merger.signature(flux_inputs(8, 2))


def test_text_lengths_of_flux_never_merge() -> None:
    merger = Merger("FluxTransformer2DModel")
    assert merger.signature(flux_inputs(4, 4, text=8)) != merger.signature(flux_inputs(4, 4, text=9))


def test_dtypes_never_merge() -> None:
    merger = Merger("FluxTransformer2DModel")
    inputs = flux_inputs(4, 4)
    half = inputs | {"hidden_states": inputs["hidden_states"].bfloat16()}
    assert merger.signature(inputs) != merger.signature(half)


def test_an_unknown_class_never_merges() -> None:
    merger = Merger("SomethingNewTransformer")
    inputs = flux_inputs(4, 4)
    assert merger.signature(inputs) != merger.signature(inputs)
    assert merger.merge([inputs]) is inputs


@torch.no_grad()
def test_merged_flux_forwards_give_what_each_gives_alone() -> None:
    model, merger = load("flux"), Merger("FluxTransformer2DModel")
    group = [flux_inputs(4, 4, seed) for seed in range(3)]
    alone = [model(**inputs, return_dict=False)[0] for inputs in group]
    merged = model(**merger.merge(group), return_dict=False)[0].split([num_samples(i) for i in group])
    for one, other in zip(alone, merged, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


@torch.no_grad()
def test_residuals_of_a_controlnet_join_with_their_forwards() -> None:
    model, merger = load("flux"), Merger("FluxTransformer2DModel")
    residuals = [[torch.randn(1, 16, 128) for _ in range(2)] for _ in range(2)]
    group = [flux_inputs(4, 4, n) | {"controlnet_block_samples": residuals[n]} for n in range(2)]
    assert merger.signature(group[0]) == merger.signature(group[1])
    alone = [model(**inputs, return_dict=False)[0] for inputs in group]
    merged = model(**merger.merge(group), return_dict=False)[0].split(1)
    for one, other in zip(alone, merged, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_a_forward_with_a_controlnet_never_merges_with_one_without() -> None:
    merger, inputs = Merger("FluxTransformer2DModel"), flux_inputs(4, 4)
    controlled = [inputs | {"controlnet_block_samples": [torch.zeros(1, 16, 128)] * n} for n in (1, 2)]
    assert len({merger.signature(each) for each in (inputs, *controlled)}) == 3


def test_pictures_beside_the_noise_keep_forwards_of_z_image_apart() -> None:
    """An input is a list with one list for each sample, which has a tensor for each image."""
    merger = Merger("ZImageTransformer2DModel")
    inputs = {"x": [[torch.zeros(16, 1, 8, 8)] * 2], "t": torch.ones(1), "cap_feats": [torch.zeros(8, 64)]}
    assert merger.signature(inputs) != merger.signature(inputs)


@torch.no_grad()
def test_qwen_prompts_of_different_lengths_merge_padded_and_masked() -> None:
    model, merger = load("qwen-image"), Merger("QwenImageTransformer2DModel")
    group = [qwen_inputs(text, seed) for seed, text in enumerate((20, 33, 27))]
    assert len({merger.signature(inputs) for inputs in group}) == 1
    alone = [model(**inputs, return_dict=False)[0] for inputs in group]
    merged = model(**merger.merge(group), return_dict=False)[0].split(1)
    for one, other in zip(alone, merged, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


@torch.no_grad()
def test_edits_merge_with_edits_of_the_same_layout_alone() -> None:
    """The tokens of two input images follow those of the noise."""
    model, merger = load("qwen-image"), Merger("QwenImageTransformer2DModel")
    layouts = (
        [(1, 2, 4), (1, 2, 2), (1, 2, 2)],
        [(1, 2, 4), (1, 2, 2), (1, 2, 2)],
        [(1, 2, 2), (1, 2, 2), (1, 2, 4)],
    )
    group = [qwen_inputs(20 + n, n) | {"img_shapes": [layout]} for n, layout in enumerate(layouts)]
    one, other, unlike = (merger.signature(inputs) for inputs in group)
    assert one == other != unlike
    alone = [model(**inputs, return_dict=False)[0] for inputs in group[:2]]
    merged = model(**merger.merge(group[:2]), return_dict=False)[0].split(1)
    for first, second in zip(alone, merged, strict=True):
        torch.testing.assert_close(first, second, atol=2e-5, rtol=0)


def test_a_lone_forward_is_not_touched() -> None:
    inputs = qwen_inputs(20, 0)
    assert Merger("QwenImageTransformer2DModel").merge([inputs]) is inputs


def test_a_unets_scalar_timesteps_become_one_per_sample() -> None:
    group = [
        {
            "sample": torch.zeros(2, 4, 8, 8),
            "timestep": torch.tensor(step),
            "added_cond_kwargs": {"t": torch.ones(2, 3)},
        }
        for step in (7, 9)
    ]
    merger = Merger("UNet2DConditionModel")
    assert merger.signature(group[0]) == merger.signature(group[1])
    merged = merger.merge(group)
    assert merged["timestep"].tolist() == [7, 7, 9, 9]
    assert merged["added_cond_kwargs"]["t"].shape == (4, 3)


def test_what_a_merged_forward_returned_is_parted_by_samples() -> None:
    video, audio, pictures = torch.arange(6).view(3, 2), torch.arange(3), ["a", "b", "c"]
    (first_video, first_audio, first), (_, last_audio, last) = split((video, audio, pictures), [1, 2])
    assert first_video.tolist() == [[0, 1]]
    assert (first_audio.tolist(), last_audio.tolist()) == ([0], [1, 2])
    assert (first, last) == (["a"], ["b", "c"])


def test_tokens_count_latent_positions_after_patching() -> None:
    assert num_tokens({"hidden_states": torch.zeros(2, 16, 64)}) == 32
    assert num_tokens({"sample": torch.zeros(2, 4, 8, 8)}) == 128
    assert num_tokens({"hidden_states": torch.zeros(1, 16, 3, 8, 8)}, (1, 2, 2)) == 48
    assert num_tokens({"hidden_states": torch.zeros(1, 16, 8, 8)}, 2) == 16
    assert num_tokens({"x": [torch.zeros(16, 1, 8, 8), torch.zeros(16, 1, 4, 4)]}, 2) == 20
