"""Diffusers' own pipeline call, of which each stage does its part.

encode   runs until the denoiser is asked, and keeps what the methods returned that reach a text encoder
prepare  (where pictures go in) answers those methods with it, and keeps what `vae.encode` returned until then
denoise  answers both, and runs until the VAE is asked to decode: with what, is the result
"""

import copy
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from inspect import signature
from types import MethodType
from typing import Any, NamedTuple

import diffusers
import torch

from deployments.families import Call
from deployments.refusal import WrongField, describe_cause
from deployments.request import CallKind, DecodeArguments, Encodings, GenerationRequest
from deployments.stages.draws import Draws
from deployments.stages.encoding_methods import encoding_methods
from deployments.stages.pictures import blank_pictures, picture_arguments
from deployments.stages.posterior import Encode, EncodingVae, blank
from deployments.stages.stub import Reached

log = logging.getLogger("ray.serve")

Method = Callable[..., Any]
AfterStep = Callable[[Any, int, torch.Tensor], None]
"""(scheduler, index of the timestep that is done, latents after it)"""


Pictures = Mapping[str, Any]
"""`image`, a list, `mask_image` and `control_image`: pictures.py opens them."""
NO_PICTURES: Pictures = {}


class PipelineCalls:
    """All kinds of call of one checkpoint."""

    def __init__(
        self, pipe: Any, calls: Mapping[CallKind, Call], place: Callable[[Any], Any] = lambda value: value
    ) -> None:
        """
        Args:
            pipe: the checkpoint's own pipeline, of whose components the others are made.
            place: as PipelineCall's.
        """
        first, *others = calls.values()
        self._calls = {first.kind: PipelineCall(pipe, first, place)}
        for call in others:
            try:
                self._calls[call.kind] = PipelineCall(related_pipeline(pipe, call), call, place)
            except Exception as error:  # constructors raise what they like
                log.warning("no %s is made of these components: %s", call.pipeline_class, describe_cause(error))

    def of(self, request: GenerationRequest) -> "PipelineCall":
        """Raises WrongField."""
        if request.kind not in self._calls:
            raise WrongField(f"this checkpoint cannot {request.kind}: the log of its start says why", "model")
        return self._calls[request.kind]

    def __iter__(self) -> Iterator["PipelineCall"]:
        return iter(self._calls.values())


class PipelineCall:
    """One pipeline's call, with stubs for the models that this stage lacks. Thread-safe.

    Every request has a shallow copy of the pipeline, and a scheduler and guiders of its own (they keep their state
    in themselves). So every scheduler and guidance mode of diffusers works, and the result is the pipeline's.
    """

    def __init__(self, pipe: Any, call: Call, place: Callable[[Any], Any] = lambda value: value) -> None:
        """place: puts what the encode stage kept where this stage computes, each time it is asked for."""
        self._pipe, self._place = pipe, place
        self._asked = call
        encoders = {name for name in pipe.components if name.startswith("text_encoder")} | {"image_encoder"}
        self._stateful = [name for name in pipe.components if name == "scheduler" or name.endswith("guider")]
        pipeline_class: Any = type(pipe)
        self._methods = encoding_methods(pipeline_class, frozenset(encoders))

    def __str__(self) -> str:
        return f"{type(self._pipe).__name__} with {type(self._pipe.scheduler).__name__}"

    def encode(
        self,
        request: GenerationRequest,
        replace: Callable[[str, Method], Method],
        *,
        pictures: Pictures = NO_PICTURES,
        max_sequence_length: int | None,
    ) -> None:
        """Up to the first forward of a denoiser.

        replace: (name, encoding method of the pipeline) -> what is called in its place.
        """
        pipe = self._copy(blank(self._pipe.vae))
        vars(pipe).update({name: replace(name, getattr(pipe, name)) for name in self._methods})
        with suppress(Reached):
            self._run(pipe, request, pictures, max_sequence_length)

    def prepare(
        self, request: GenerationRequest, encodings: Encodings, pictures: Pictures, encode: Encode
    ) -> None:
        """Up to the first forward of a denoiser. encode: what is called in place of `vae.encode`."""
        pipe = self._copy(encode)
        self._replay(pipe, encodings)
        with suppress(Reached):
            self._run(pipe, request, pictures, None)

    def denoise(
        self,
        request: GenerationRequest,
        components: Mapping[str, Any],
        encodings: Encodings | None = None,
        *,
        encode: Encode | None = None,
        pictures: Pictures = NO_PICTURES,
        draws: Draws | None = None,
        after_step: AfterStep | None = None,
        max_sequence_length: int | None = None,
    ) -> DecodeArguments:
        """What the pipeline decodes in the end.

        Args:
            components: what stands for the denoisers, by name; without encodings, for the text models too.
            encodings: what the encode stage kept, where it is needed.
            encode: what is called in place of `vae.encode`; None: zeros are its answer.
            pictures: that go in.
            draws: for schedulers that are given no generator.
        """
        pipe = self._copy(encode or blank(self._pipe.vae))
        vars(pipe).update(components)
        if encodings is not None:
            self._replay(pipe, encodings)
        if draws is not None or after_step is not None:
            _watch_steps(pipe.scheduler, draws, after_step)
        try:
            return self._until_decode(pipe, request, pictures, max_sequence_length)
        finally:
            # It holds its scheduler and, by after_step, the pictures: a cycle that nobody would collect for long.
            vars(pipe.scheduler).pop("step", None)

    def finish(
        self,
        request: GenerationRequest,
        components: Mapping[str, Any],
        encodings: Encodings,
        latents: torch.Tensor,
        *,
        encode: Encode | None = None,
        pictures: Pictures = NO_PICTURES,
    ) -> DecodeArguments:
        """What the pipeline would decode if these were the latents after its last step.

        components: denoisers that predict nothing and cost nothing.
        """
        pipe = self._copy(encode or blank(self._pipe.vae))
        vars(pipe).update(components)
        self._replay(pipe, encodings)
        vars(pipe.scheduler)["step"] = lambda *_, **__: _Step(latents, latents)
        return self._until_decode(pipe, request, pictures, None)

    def blank_pictures(self, request: GenerationRequest) -> Pictures:
        """Of the request's size, as many as it needs."""
        return blank_pictures(self._asked, request.size)

    def _copy(self, encode: Encode) -> Any:
        """encode: in place of the VAE's."""
        pipe = copy.copy(self._pipe)
        # Not by setattr, which would write each into the pipeline's config.
        vars(pipe).update({name: copy.deepcopy(getattr(self._pipe, name)) for name in self._stateful})
        vars(pipe)["vae"] = EncodingVae(self._pipe.vae, encode)
        return pipe

    def _replay(self, pipe: Any, encodings: Encodings) -> None:
        left = deque(encodings)

        def replay(name: str) -> Method:
            def replayed(*_: Any, **__: Any) -> Any:
                if not left or left[0][0] != name:
                    there = left[0][0] if left else "nothing"
                    raise RuntimeError(f"{self} calls {name} where the encode stage's called {there}")
                return self._place(left.popleft()[1])

            return replayed

        vars(pipe).update({name: replay(name) for name in self._methods})

    def _until_decode(
        self, pipe: Any, request: GenerationRequest, pictures: Pictures, max_sequence_length: int | None
    ) -> DecodeArguments:
        try:
            self._run(pipe, request, pictures, max_sequence_length)
        except Reached as reached:
            args, kwargs = reached.arguments
            return DecodeArguments(
                args, {n: v for n, v in kwargs.items() if n not in {"generator", "return_dict"}}
            )
        raise RuntimeError(f"{self} ended without decoding anything")

    def _run(
        self, pipe: Any, request: GenerationRequest, pictures: Pictures, max_sequence_length: int | None
    ) -> None:
        """Always ends by an exception: Reached, or a fault."""
        arguments = call_arguments(type(pipe), request, max_sequence_length)
        size = (request.width, request.height) if request.width else None
        pipe(**arguments | picture_arguments(self._asked, pictures, size))


def related_pipeline(pipe: Any, call: Call) -> Any:
    """Another class over the same components, as `from_pipe` makes it, without those that it does not know."""
    pipeline_class = getattr(diffusers, call.pipeline_class)
    wanted = signature(pipeline_class.__init__).parameters
    related = pipeline_class(
        **{name: part for name, part in pipe.components.items() if name in wanted},
        **{name: value for name, value in pipe.config.items() if name in wanted and name not in pipe.components},
    )
    related.set_progress_bar_config(disable=True)
    return related


def call_arguments(
    pipeline_class: Any, request: GenerationRequest, max_sequence_length: int | None = None
) -> dict[str, Any]:
    """What a pipeline is called with for a request: those of its fields that are set and that it knows."""
    values = {
        "prompt": request.prompt.text,
        "negative_prompt": request.prompt.negative_text,
        "height": request.height,
        "width": request.width,
        **dict.fromkeys(("num_frames", "frames", "video_length"), request.num_frames),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "guidance_scale_2": request.guidance_scale_2,
        "true_cfg_scale": request.true_cfg_scale,
        "strength": request.strength,
        "controlnet_conditioning_scale": request.control_scale,
        "frame_rate": request.fps,
        "max_sequence_length": max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "np",
        # For pipelines that would choose another size near the one that is asked for (FLUX.1-Kontext).
        "max_area": request.width and request.width * request.height,
        "_auto_resize": False,
        # Language models that rewrite prompts draw from the process's generator.
        "enable_prompt_rewrite": False,
        "use_pe": False,
        "use_resolution_binning": False,
    }
    parameters = _parameters(pipeline_class)
    known: dict[str, Any] = {
        name: value for name, value in values.items() if name in parameters and value is not None
    }
    if "guidance_schedule" in parameters and request.guidance_scale is not None:
        known["guidance_schedule"] = None  # its default, for so many steps, and a scale exclude each other
    return known


@functools.cache
def _parameters(pipeline_class: Any) -> frozenset[str]:
    return frozenset(signature(pipeline_class.__call__).parameters)


class _Step(NamedTuple):
    """As schedulers return it, as a tuple or with names."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


def _watch_steps(scheduler: Any, draws: Draws | None, after_step: AfterStep | None) -> None:
    """In place. A bound method with the signature of the original: pipelines read from it whether to pass a
    generator, and those that copy their scheduler copy it too."""
    original = type(scheduler).step
    drawing = original if draws is None else draws.within(original)
    # Of a picture that is drawn anew, the first timesteps are left out.
    num_done: int | None = None

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_done
        if num_done is None:
            num_done = getattr(self, "begin_index", None) or 0
        result = drawing(self, *args, **kwargs)
        num_done += 1
        if after_step is not None:
            after_step(self, num_done - 1, result[0])
        return result

    vars(scheduler)["step"] = MethodType(step, scheduler)
