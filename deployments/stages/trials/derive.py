"""Finds out what is needed to serve a pipeline that has no entry in `families`. Run once, where its app is built.

    python -m deployments.stages.trials.derive FOLDER        prints one line of JSON

It runs in a process of its own, because it imports torch and the process that builds the app does not.
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

from deployments.answers import DecodeArguments
from deployments.checkpoints.components import VAES, needed_names, read_index, weightless
from deployments.checkpoints.derived import tell_calls
from deployments.checkpoints.modular import is_modular
from deployments.config.transformer import TransformerConfig
from deployments.engine.denoiser_stand_in import denoiser_stand_ins
from deployments.engine.load import build_skeletons
from deployments.errors import describe_cause
from deployments.families import Call, Geometry
from deployments.families.calls import find_calls, known_calls
from deployments.families.sources import REQUIRED
from deployments.request import GenerationRequest, MediaSize, Prompt
from deployments.stages.call import PipelineCalls
from deployments.stages.modular import find_modular_calls
from deployments.stages.pipeline import load_pipeline
from deployments.stages.pixels.pictures import blank_pictures
from deployments.stages.trials.blank import BlankTexts
from deployments.stages.trials.zeros import Zeros, decoded_size
from deployments.stages.warm_up import request_with_defaults

CPU = torch.device("cpu")
NUM_STEPS = 4
"""Enough for every scheduler; some do not take fewer."""
MULTIPLES = (8, 16, 32, 64, 128)
"""Multiples of width and height, in pixels, to try: the first for which the pipeline makes the requested size."""
WIDTH, HEIGHT = 5, 3
"""Tried size, in multiples: odd numbers, so that a pipeline that needs twice the multiple fails."""
NUM_FRAMES = 25
"""One more than a multiple of 2, 3, 4, 6 and 8, the numbers of frames that VAEs turn into one latent frame."""
ALL_FRAMES = 1 << 30
"""`frames_per_decode` of a pipeline that decodes all frames at once: more than any request has."""
RATIOS = (1, 4 / 3, 3 / 2, 16 / 9, 2, 3 / 4, 2 / 3, 9 / 16, 1 / 2)
"""Ratios of width to height to request from a pipeline that chooses the size itself."""
MOST_ASKED = 4
"""Most calls, each with the size that the previous one made, until the pipeline makes the requested size."""
PICTURE = MediaSize(1024, 1024, NUM_FRAMES)
"""Size of the input images and video of a call with the default size."""


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
        """Error of the last call that failed."""
        self._has_drawn = False

    def describe(self) -> dict[str, Any]:
        """Returns the fields of a Family, and the checkpoint's geometry."""
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
        """Finds the geometry by calls that compute nothing, with the default size and with small sizes."""
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
            raise ValueError("it draws nothing if a request gives no size")
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
        """Returns numbers of frames to try: some denoisers take only their call's default number (Latte)."""
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
        """Returns whether the pipeline made this size on request. A call that takes no height may have made it by
        chance, from the size of the input image."""
        twice = replace(size, width=2 * size.width, height=2 * size.height)
        return "height" in self._kind.parameters or self._makes(self._kind, twice) == twice

    def _own_sizes(self) -> set[tuple[int, int]]:
        """Returns the sizes of a pipeline that chooses them itself: those that it makes again when requested.

        Raises ValueError if there are none.
        """
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
            raise ValueError(
                "it chooses another size than it is asked for, and yet another when asked for that one"
            )
        return found

    def _frame_multiple(self, asked: MediaSize, stride: int) -> int:
        """Returns the multiple by which the number of frames may grow from one, so that the pipeline makes it."""
        if not self._is_video:
            return 1
        for multiple in (stride, 2 * stride):
            more = replace(asked, num_frames=asked.num_frames + multiple)
            if self._makes(self._kind, more) == more:
                return multiple
        return stride

    def _num_frames(self, usual: DecodeArguments, stride: int) -> int:
        """Returns the default number of frames: the call's or, if it depends on the denoiser, what is made."""
        if not self._is_video or self._kind.num_frames > 1:
            return self._kind.num_frames
        return (int(usual.latents.shape[2]) - 1) * stride + 1

    def _draws(self, call: Call, geometry: Geometry) -> bool:
        """Returns whether this kind of call runs with the checkpoint's components and makes the requested size."""
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
        """Returns what is decoded for a size (None: the default size); None if the pipeline fails."""
        denoisers = denoiser_stand_ins(self._skeletons, dtype=torch.float32, device=CPU, submit=self._zeros)
        components = {**denoisers, **self._blank.on(CPU)}
        request = self._request(call, size)
        pictures = blank_pictures(call, size or PICTURE)
        try:
            return self._calls.of(request).denoise(
                request, components, pictures=pictures, max_sequence_length=call.max_sequence_length
            )
        except Exception as error:  # pipelines may raise anything for a size that they do not take
            self._failure = error
            return None

    def _made(self, arguments: DecodeArguments) -> MediaSize | None:
        """Returns the size that the VAE would make of the arguments; None if it does not take them."""
        self._has_drawn = True
        try:
            made = decoded_size(self._pipe.vae, arguments)
        except Exception:  # VAEs may raise anything
            return None
        return made if self._is_video else replace(made, num_frames=1)

    def _request(self, call: Call, size: MediaSize | None) -> GenerationRequest:
        defaults = call.defaults
        num_steps = defaults.num_inference_steps
        if "guidance_schedule" not in call.parameters:
            num_steps = min(NUM_STEPS, num_steps)
        request = request_with_defaults(Prompt("", None, is_guided=False), size, call.kind, defaults)
        strength = defaults.strength and 1.0
        return replace(request, num_inference_steps=num_steps, strength=strength, guidance_scale_2=None)

    def _check_parameters(self) -> None:
        parameters = self._kind.parameters
        needed = {name for name, default in parameters.items() if default is REQUIRED}
        if others := sorted(needed - {"prompt", "image", "mask_image", "control_image", "video"}):
            raise ValueError(f"it does not draw from a prompt and images alone, but needs {', '.join(others)}")
        if "prompt" not in parameters:
            raise ValueError("it takes no prompt")


def _to_eights(side: float) -> int:
    return round(side / 8) * 8


if __name__ == "__main__":
    try:
        print(json.dumps(Derived(Path(sys.argv[1])).describe()))
    except ValueError as error:
        sys.exit(str(error))
