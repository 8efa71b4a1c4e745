"""What a pipeline that has no entry in `families` tells of itself: run once, where its app is built.

    python -m deployments.stages.derive FOLDER        prints one line of JSON

In a process of its own, for it imports torch, and who asks does not.
"""

import json
import sys
from dataclasses import asdict, replace
from itertools import product
from math import gcd, sqrt
from pathlib import Path
from typing import Any

import diffusers
import torch

from deployments.checkpoints.components import VAES, needed_names, read_index, weightless
from deployments.checkpoints.derived import tell_calls
from deployments.checkpoints.modular import is_modular
from deployments.config import TransformerConfig
from deployments.engine.load import build_skeletons
from deployments.engine.stand_in import stand_ins
from deployments.families import Call, Geometry
from deployments.families.calls import REQUIRED, find_calls, known_calls
from deployments.refusal import describe_cause
from deployments.request import DecodeArguments, GenerationRequest, MediaSize, Prompt
from deployments.stages.blank import BlankTexts
from deployments.stages.call import PipelineCalls
from deployments.stages.modular import find_modular_calls
from deployments.stages.pictures import blank_pictures
from deployments.stages.pipeline import load_pipeline
from deployments.stages.zeros import Zeros, decoded_size

CPU = torch.device("cpu")
NUM_STEPS = 4
"""Enough for every scheduler; some do not take fewer."""
MULTIPLES = (8, 16, 32, 64, 128)
"""Of a size, in pixels: the first of which the pipeline makes what is asked."""
WIDTH, HEIGHT = 5, 3
"""Times a multiple: odd, so that a pipeline that wants twice as much is found out."""
NUM_FRAMES = 25
"""One more than a multiple of 2, 3, 4, 6 and 8, which VAEs make one latent frame of."""
ALL_FRAMES = 1 << 30
"""Decoded at once: as many as somebody asks for."""
RATIOS = (1, 4 / 3, 3 / 2, 16 / 9, 2, 3 / 4, 2 / 3, 9 / 16, 1 / 2)
"""Width to height, of what a pipeline is asked that chooses by itself."""
MOST_ASKED = 4
"""Times in which what it makes of what it makes comes to rest."""
PICTURE = MediaSize(1024, 1024, NUM_FRAMES)
"""That goes in where the size by default is asked for."""


class Derived:
    """One checkpoint's pipeline. Raises ValueError if it cannot be served as it is."""

    def __init__(self, folder: Path) -> None:
        self._index = read_index(folder)
        self._class: Any = getattr(diffusers, self._index["_class_name"], None)
        if self._class is None:
            raise ValueError(f"diffusers {diffusers.__version__} has no such pipeline")
        self._is_modular = is_modular(self._index)
        self._kinds = (
            find_modular_calls(folder, self._index)
            if self._is_modular
            else known_calls(find_calls(self._index["_class_name"]), needed_names(self._index))
        )
        self._kind = next(iter(self._kinds.values()))
        self._check_parameters()
        self._skeletons = build_skeletons(folder, self._index)
        if not self._skeletons:
            raise ValueError("it has no model between its text encoders and its VAE that diffusers knows")
        config = TransformerConfig()
        self._pipe = load_pipeline(folder, self._index, weightless(self._index), config, variant=None)
        self._calls = PipelineCalls(self._pipe, self._kinds)
        self._zeros = Zeros(self._skeletons)
        self._blank = BlankTexts(folder, self._index, torch.float32)
        self._failure: Exception | None = None
        """Of the last call that failed."""
        self._has_drawn = False

    def describe(self) -> dict[str, Any]:
        """A Family's own fields, and the checkpoint's geometry."""
        try:
            geometry = self.geometry()
        except ValueError as error:
            if self._failure is None or self._has_drawn:
                raise
            raise ValueError(f"its call fails: {describe_cause(self._failure)}") from error
        return {
            "kinds": [kind for kind, call in self._kinds.items() if self._draws(call, geometry)],
            "reads_vae_buffers": self._has_vae_buffers,
            "geometry": asdict(geometry),
            "calls": tell_calls(self._kinds) if self._is_modular else [],
        }

    def geometry(self) -> Geometry:
        """Found by calls that compute nothing: of the size by default, and of small ones."""
        sizes: list[tuple[int, int]] = []
        for num_frames, multiple in product(self._tried_frames(self._kind), MULTIPLES):
            asked = MediaSize(WIDTH * multiple, HEIGHT * multiple, num_frames)
            arguments = self._decoded(self._kind, asked)
            if arguments is not None and self._made(arguments) == asked and self._is_told(asked):
                break
        else:
            sizes = sorted(self._own_sizes())
            multiple = gcd(*(side for size in sizes for side in size))
            asked = MediaSize(*sizes[0], NUM_FRAMES if self._is_video else 1)
            arguments = self._decoded(self._kind, asked)
        assert arguments is not None
        latents = arguments.latents
        pixels = asked.width // latents.shape[-1]
        stride = self._frame_stride(latents, asked.num_frames)
        usual = self._decoded(self._kind, None)
        if usual is None:
            raise ValueError("it makes nothing of a request that says no size")
        return Geometry(
            width=usual.latents.shape[-1] * pixels,
            height=usual.latents.shape[-2] * pixels,
            size_multiple=multiple,
            latent_pixels=pixels,
            latent_channels=latents.shape[1],
            num_frames=self._num_frames(usual, stride),
            frame_stride=stride,
            frame_multiple=self._frame_multiple(asked, stride),
            frames_per_decode=self._frames_per_decode(arguments),
            sizes=sizes,
        )

    def _tried_frames(self, call: Call) -> tuple[int, ...]:
        """Some denoisers take as many frames as their call makes by default, and no others (Latte)."""
        return tuple(dict.fromkeys((NUM_FRAMES, call.num_frames))) if call.media == "video" else (1,)

    def _frame_stride(self, latents: torch.Tensor, num_frames: int) -> int:
        if not self._is_video:
            return 1
        if latents.ndim == 5:
            return (num_frames - 1) // (latents.shape[2] - 1)
        return 1 if num_frames == NUM_FRAMES else num_frames - 1

    def _frames_per_decode(self, arguments: DecodeArguments) -> int | None:
        if not self._is_video or arguments.latents.ndim == 5:
            return None
        return len(arguments.latents) if arguments.more else ALL_FRAMES

    def _is_told(self, size: MediaSize) -> bool:
        """Whether it made this because it was asked; who is told no size but the picture's may do so by chance."""
        twice = replace(size, width=2 * size.width, height=2 * size.height)
        return "height" in self._kind.parameters or self._makes(self._kind, twice) == twice

    def _own_sizes(self) -> set[tuple[int, int]]:
        """Those that it makes of what is asked in some shape, and of themselves. Raises ValueError."""
        usual = self._makes(self._kind, None)
        if usual is None or (self._kind.max_images and "height" in self._kind.parameters):
            raise ValueError("it chooses another size than it is asked for")
        found, side = set(), sqrt(usual.width * usual.height)
        for ratio in RATIOS:
            width, height = _to_eights(side * sqrt(ratio)), _to_eights(side / sqrt(ratio))
            size: MediaSize | None = MediaSize(width, height, NUM_FRAMES if self._is_video else 1)
            for _ in range(MOST_ASKED):
                asked, size = size, self._makes(self._kind, size)
                if size is None or size == asked:
                    break
            if size is not None and size == asked:
                found.add((size.width, size.height))
        if not found:
            raise ValueError("it chooses another size than it is asked for, and another of that")
        return found

    def _frame_multiple(self, asked: MediaSize, stride: int) -> int:
        """Of how many frames more than one it makes what is asked."""
        if not self._is_video:
            return 1
        for multiple in (stride, 2 * stride):
            more = replace(asked, num_frames=asked.num_frames + multiple)
            if self._makes(self._kind, more) == more:
                return multiple
        return stride

    def _num_frames(self, usual: DecodeArguments, stride: int) -> int:
        """Of a request that does not say: as the call declares, or, where it asks the denoiser, as it makes."""
        if not self._is_video or self._kind.num_frames > 1:
            return self._kind.num_frames
        return (int(usual.latents.shape[2]) - 1) * stride + 1

    def _draws(self, call: Call, geometry: Geometry) -> bool:
        """Whether this kind of call runs over the checkpoint's components, and makes the size that is asked."""
        multiple = geometry.size_multiple
        width, height = geometry.sizes[0] if geometry.sizes else (WIDTH * multiple, HEIGHT * multiple)
        tried = (MediaSize(width, height, num_frames) for num_frames in self._tried_frames(call))
        return any(self._makes(call, size) == size for size in tried)

    def _makes(self, call: Call, size: MediaSize | None) -> MediaSize | None:
        arguments = self._decoded(call, size)
        return None if arguments is None else self._made(arguments)

    @property
    def _has_vae_buffers(self) -> bool:
        vaes = [part.skeleton for name, part in self._pipe.components.items() if name in VAES and part is not None]
        return any({name for name, _ in vae.named_buffers()} & vae.state_dict().keys() for vae in vaes)

    @property
    def _is_video(self) -> bool:
        return self._kind.media == "video"

    def _decoded(self, call: Call, size: MediaSize | None) -> DecodeArguments | None:
        """What is decoded for a size, or for none that is said; None: the pipeline refuses."""
        denoisers = stand_ins(self._skeletons, dtype=torch.float32, device=CPU, submit=self._zeros)
        components = {**denoisers, **self._blank.on(CPU)}
        request = self._request(call, size)
        pictures = blank_pictures(call, size or PICTURE)
        try:
            return self._calls.of(request).denoise(
                request, components, pictures=pictures, max_sequence_length=call.max_sequence_length
            )
        except Exception as error:  # pipelines raise what they like of a size that they do not take
            self._failure = error
            return None

    def _made(self, arguments: DecodeArguments) -> MediaSize | None:
        """What the VAE would make of it."""
        self._has_drawn = True
        try:
            made = decoded_size(self._pipe.vae, arguments)
        except Exception:  # as VAEs do
            return None
        return made if self._is_video else replace(made, num_frames=1)

    def _request(self, call: Call, size: MediaSize | None) -> GenerationRequest:
        defaults = call.defaults
        return GenerationRequest(
            Prompt("", None, is_guided=False),
            width=size.width if size else None,  # type: ignore[arg-type]
            height=size.height if size else None,  # type: ignore[arg-type]
            num_frames=size.num_frames if size else None,  # type: ignore[arg-type]
            num_inference_steps=defaults.num_inference_steps
            if "guidance_schedule" in call.parameters
            else min(NUM_STEPS, defaults.num_inference_steps),
            guidance_scale=defaults.guidance_scale,
            true_cfg_scale=defaults.true_cfg_scale,
            seed=0,
            output_format="png",
            output_compression=100,
            fps=defaults.fps,
            kind=call.kind,
            strength=defaults.strength and 1.0,
            control_scale=defaults.control_scale,
        )

    def _check_parameters(self) -> None:
        parameters = self._kind.parameters
        needed = {name for name, default in parameters.items() if default is REQUIRED}
        if others := sorted(needed - {"prompt", "image", "mask_image", "control_image", "video"}):
            raise ValueError(f"it does not draw from a prompt and pictures alone, but needs {', '.join(others)}")
        if "prompt" not in parameters:
            raise ValueError("it takes no prompt")


def _to_eights(side: float) -> int:
    return round(side / 8) * 8


if __name__ == "__main__":
    try:
        print(json.dumps(Derived(Path(sys.argv[1])).describe()))
    except ValueError as error:
        sys.exit(str(error))
