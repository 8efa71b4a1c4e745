"""The training of `shapes`, at a scale that takes seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from deployments.training.shapes import train
from deployments.training.shapes.plan import FlowPhase, Plan
from deployments.training.shapes.train import train_shapes

TOY = Plan(
    num_threads=1,
    num_autoencoder_steps=3,
    autoencoder_batch=1,
    num_reading_steps=3,
    reading_tokens_per_step=2 * 32,
    num_scenes=4,
    num_other_scenes=2,
    num_decoder_steps=3,
    num_drawings=2,
    num_other_drawings=2,
    other_sizes=((96, 64),),
    flow_phases=(
        FlowPhase("layout", 4, lr=1e-3, time_mean=1.0, other_share=0.5, num_base_steps=1),
        FlowPhase("outline", 3, lr=1e-3, time_mean=0.0, other_share=0.5, num_base_steps=0),
    ),
    tokens_per_step=2 * 96,
    num_sheets=2,
    num_sheet_prompts=2,
    sample_steps=1,
    save_every_s=0,
)


LAST_LAYERS = {
    "autoencoder": ("vae", "decoder.conv_out.weight"),
    "reading": ("all", "clip.weight"),
    "layout": ("average", "proj_out.weight"),
    "outline": ("average", "proj_out.weight"),
    "decoder": ("vae", "decoder.conv_out.weight"),
}
"""For each phase, a part of its state and a layer in it."""


class Interrupted(Exception):
    """Interrupts a training, as a closed laptop would."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_shapes(tmp_path_factory.mktemp("toy") / "out", TOY)


def test_a_trained_checkpoint_is_drawn_from_by_plain_diffusers(trained: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(trained)
    pipeline.set_progress_bar_config(disable=True)
    [picture] = pipeline("a red circle", width=96, height=64, num_inference_steps=1, max_sequence_length=32).images
    assert picture.size == (96, 64)


def test_samples_are_written_on_the_way(trained: Path) -> None:
    names = sorted(path.name for path in (trained.parent / "sheets").iterdir())
    assert names == [
        "autoencoder-00001.png",
        "autoencoder-00002.png",
        "autoencoder-00003.png",
        "decoder-00001.png",
        "decoder-00002.png",
        "decoder-00003.png",
        "layout-00002.png",
        "layout-00004.png",
        "outline-00001.png",
        "outline-00002.png",
        "outline-00003.png",
    ]


def test_a_training_interrupted_in_every_phase_goes_on_as_if_it_had_not_been(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The weights are equal up to rounding in most of a last layer: where gradients are near zero, Adam turns
    their rounding into whole steps.

    It tests every phase with --thorough, otherwise one.
    """
    phases = list(LAST_LAYERS) if request.config.getoption("--thorough") else ["layout"]
    interrupted = {}
    step_phase = train._Run.train

    def interrupt_after_two(self: Any, name: str, phase: Any) -> None:
        step = phase.step

        def step_twice(number: int) -> float:
            if number == 2 and name in phases and name not in interrupted:
                raise Interrupted
            return float(step(number))

        phase.step = step_twice
        step_phase(self, name, phase)

    monkeypatch.setattr(train._Run, "train", interrupt_after_two)
    for phase in phases:
        with pytest.raises(Interrupted):
            train_shapes(tmp_path, TOY)
        interrupted[phase] = last_weights(tmp_path, phase)
    assert not (tmp_path / "shapes").exists()
    train_shapes(tmp_path, TOY)
    for phase in phases:
        resumed, straight = last_weights(tmp_path, phase), last_weights(trained.parent, phase)
        assert (resumed - straight).abs().median() < 0.2 * (interrupted[phase] - straight).abs().median(), phase


def last_weights(out_dir: Path, phase: str) -> torch.Tensor:
    """Returns the phase's layer from the last saved state."""
    _, state = torch.load(out_dir / "training.pt", weights_only=True)[phase]
    part, layer = LAST_LAYERS[phase]
    weights: torch.Tensor = state[part][layer]
    return weights


def test_a_complete_checkpoint_is_never_overwritten(trained: Path) -> None:
    with pytest.raises(FileExistsError, match="is complete"):
        train_shapes(trained.parent, TOY)


def test_a_folder_of_another_plan_is_refused(tmp_path: Path) -> None:
    torch.save({"plan": repr(replace(TOY, seed=1))}, tmp_path / "training.pt")
    with pytest.raises(FileExistsError, match="another plan"):
        train_shapes(tmp_path, TOY)
