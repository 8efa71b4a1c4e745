"""The amount of data and steps that `shapes` is trained with."""

from dataclasses import dataclass

Size = tuple[int, int]
"""Width and height in pixels."""

BASE_SIZE: Size = (128, 128)


@dataclass(frozen=True)
class FlowPhase:
    """The settings of one phase of the transformer's training."""

    name: str
    num_steps: int
    lr: float
    time_mean: float
    """Mean of the timesteps' logits; above 0 is towards noise, where the layout is decided."""
    other_share: float
    """Share of steps with another size or a longer padded text."""
    num_base_steps: int
    """The first steps have none of these."""


@dataclass(frozen=True)
class Plan:
    """The settings of a whole training. Tests use a plan that takes seconds."""

    seed: int = 0
    num_threads: int = 2
    num_autoencoder_steps: int = 3000
    autoencoder_batch: int = 2
    """Scenes of 128 x 128 per step, or four times as many crops of 64 x 64."""
    autoencoder_lr: float = 1e-3
    num_reading_steps: int = 1200
    reading_tokens_per_step: int = 64 * 32
    """64 sentences of 32 tokens each."""
    reading_lr: float = 1e-3
    num_scenes: int = 8_000
    """Number of images of 128 x 128 whose latents the transformer is trained on."""
    num_other_scenes: int = 800
    """Number of such images of each other size."""
    other_sizes: tuple[Size, ...] = ((160, 96), (96, 160), (192, 192), (256, 256))
    tokens_per_step: int = 24 * 96
    """Text and image tokens of one batch, whatever the size: 24 images of 128 x 128 with 32 text tokens each."""
    flow_phases: tuple[FlowPhase, ...] = (
        FlowPhase("layout", 3600, lr=1.6e-3, time_mean=1.2, other_share=0.2, num_base_steps=900),
        FlowPhase("outline", 1400, lr=8e-4, time_mean=0.0, other_share=0.2, num_base_steps=350),
        FlowPhase("sizes", 3500, lr=8e-4, time_mean=0.5, other_share=0.5, num_base_steps=0),
    )
    """The phases of the transformer's training; each starts from the averaged weights of the one before."""
    num_decoder_steps: int = 5000
    decoder_lr: float = 6e-4
    num_drawings: int = 1000
    """Number of images of 128 x 128 that the transformer draws for the decoder's training."""
    num_other_drawings: int = 60
    """Number of such images of each other size."""
    num_sheets: int = 12
    """Sample sheets per phase."""
    num_sheet_prompts: int = 16
    save_every_s: float = 60.0
    sample_steps: int = 10
    """Denoising steps of the images on the sheets."""


EMBEDDED_PLAN = Plan()
"""The default of `relay train-shapes`, with which the embedded weights must be made."""
