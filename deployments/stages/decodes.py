"""What a pipeline's call has decoded: noted, and answered with next to nothing, until it has asked for all.

A picture is one call of `vae.decode`, and so is a video; but a VAE that knows no time is given some frames of a
video at a time (AnimateDiff, Latte), and its sound, if it has one, has a VAE of its own (LTX-2).
"""

from typing import Any, Literal, NoReturn

import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from deployments.request import DecodeArguments
from deployments.stages.posterior import ChangedVae
from deployments.stages.stub import reach

_NOT_PASSED_ON = frozenset({"generator", "return_dict"})


class Decodes:
    """Of one call."""

    def __init__(self, media: Literal["image", "video"]) -> None:
        self._media = media
        self._has_sound = False
        self._video: list[DecodeArguments] = []
        self._sound: DecodeArguments | None = None

    def attach(self, pipe: Any) -> None:
        """Its VAEs tell here what they are to decode."""
        vars(pipe)["vae"] = ChangedVae(pipe.vae, decode=self._decode)
        if getattr(pipe, "audio_vae", None) is not None:
            self._has_sound = True
            vars(pipe)["audio_vae"] = ChangedVae(pipe.audio_vae, decode=self._decode_sound)

    @property
    def arguments(self) -> DecodeArguments | None:
        """None: it has asked for nothing."""
        if not self._video:
            return None
        first, *more = self._video
        return DecodeArguments(first.args, first.kwargs, more=tuple(more), sound=self._sound)

    def _decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> DecoderOutput:
        self._video.append(_noted((latents, *args), kwargs))
        if not self._has_sound and (self._media == "image" or latents.ndim != 4):
            reach()
        # A pixel of each: what becomes of them, the decode stage does.
        return DecoderOutput(sample=latents.new_zeros(len(latents), 3, *[1] * (latents.ndim - 2)))

    def _decode_sound(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        if not latents.numel():
            raise ValueError("so few frames, at so many a second, are too short for sound: its latents are empty")
        self._sound = _noted((latents, *args), kwargs)
        reach()


def _noted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> DecodeArguments:
    return DecodeArguments(args, {name: value for name, value in kwargs.items() if name not in _NOT_PASSED_ON})
