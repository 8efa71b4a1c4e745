"""Records a pipeline's decode calls, and returns tiny tensors from them, until the pipeline has made all of them.

An image is one call of `vae.decode`, and so is a video. But a VAE for images gets some frames of a video at a time
(AnimateDiff, Latte), and a video's sound has a VAE of its own (LTX-2).
"""

from typing import Any, Literal, NoReturn

import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from deployments.answers import DecodeArguments
from deployments.stages.pixels.posterior import ChangedVae
from deployments.stages.stub import reach
from deployments.stages.tensors import lies_channels_last, to_cpu

_NOT_PASSED_ON = frozenset({"generator", "return_dict"})


class Decodes:
    """The decode calls of one pipeline call."""

    def __init__(self, media: Literal["image", "video"]) -> None:
        self._media = media
        self._has_sound = False
        self._video: list[DecodeArguments] = []
        self._sound: DecodeArguments | None = None

    def attach(self, pipe: Any) -> None:
        """Replaces the pipeline's VAEs by ones whose decode calls are recorded here."""
        vars(pipe)["vae"] = ChangedVae(pipe.vae, decode=self._decode)
        if getattr(pipe, "audio_vae", None) is not None:
            self._has_sound = True
            vars(pipe)["audio_vae"] = ChangedVae(pipe.audio_vae, decode=self._decode_sound)

    @property
    def arguments(self) -> DecodeArguments | None:
        """The recorded arguments; None: the pipeline has not decoded anything."""
        if not self._video:
            return None
        first, *more = self._video
        return DecodeArguments(first.args, first.kwargs, more=tuple(more), sound=self._sound)

    def _decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> DecoderOutput:
        self._video.append(_noted((latents, *args), kwargs))
        if not self._has_sound and (self._media == "image" or latents.ndim != 4):
            reach()
        # One pixel per frame: the decode stage makes the real ones, and runs whatever follows.
        return DecoderOutput(sample=latents.new_zeros(len(latents), 3, *[1] * (latents.ndim - 2)))

    def _decode_sound(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        if not latents.numel():
            raise ValueError("the video is too short for sound: ask for more frames, or for a lower fps")
        self._sound = _noted((latents, *args), kwargs)
        reach()


def _noted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> DecodeArguments:
    return DecodeArguments(args, {name: value for name, value in kwargs.items() if name not in _NOT_PASSED_ON})


def arguments_to_cpu(of: DecodeArguments) -> DecodeArguments:
    """Copies arguments to the CPU, for the decode stage."""
    return DecodeArguments(
        to_cpu(of.args),
        to_cpu(of.kwargs),
        is_channels_last=lies_channels_last(of.latents),
        more=tuple(map(arguments_to_cpu, of.more)),
        sound=None if of.sound is None else arguments_to_cpu(of.sound),
    )
