"""Diffusers' own pipeline call, of which each stage does its part.

encode   runs until the denoiser is asked, and keeps what the methods returned that reach a text encoder
prepare  (where pictures go in) answers those methods with it, and keeps what `vae.encode` returned until then
denoise  answers both, and runs until the VAEs have been asked to decode all: with what, is the result
"""

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import ModularPipeline

from deployments.families import Call
from deployments.refusal import WrongField, describe_cause
from deployments.request import CallKind, DecodeArguments, Encodings, GenerationRequest
from deployments.schedulers import SchedulerConfig
from deployments.stages.decodes import Decodes
from deployments.stages.draws import Draws
from deployments.stages.encoding_methods import Method, encoding_names, replace_encoding
from deployments.stages.modular import call_names, set_guidance
from deployments.stages.pictures import blank_pictures, picture_arguments
from deployments.stages.posterior import ChangedVae, Encode, blank
from deployments.stages.schedulers import build_schedulers
from deployments.stages.steps import AfterStep, watch_steps
from deployments.stages.stub import Reached
from deployments.stages.tensors import shapes_only, without_shapes

log = logging.getLogger("ray.serve")

CONNECTORS = "connectors"
"""The component that makes all hidden states of a text encoder, a GiB of LTX-2's, into what a denoiser takes."""

Pictures = Mapping[str, Any]
"""`image`, a list, `mask_image`, `control_image` and `video`, a list: pictures.py opens them."""
NO_PICTURES: Pictures = {}
NO_SCHEDULERS: Mapping[str, Any] = {}


class PipelineCalls:
    """All kinds of call of one checkpoint."""

    def __init__(
        self,
        pipe: Any,
        calls: Mapping[CallKind, Call],
        place: Callable[[Any], Any] = lambda value: value,
        schedulers: Sequence[SchedulerConfig] = (),
    ) -> None:
        """
        Args:
            pipe: the checkpoint's own pipeline, of whose components the others are made.
            place: as PipelineCall's.
            schedulers: that requests may ask for. Raises CannotServe.
        """
        first, *others = calls.values()
        built = build_schedulers(pipe, schedulers)
        self._calls = {first.kind: PipelineCall(pipe, first, place, built)}
        for call in others:
            try:
                self._calls[call.kind] = PipelineCall(related_pipeline(pipe, call), call, place, built)
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

    def __init__(
        self,
        pipe: Any,
        call: Call,
        place: Callable[[Any], Any] = lambda value: value,
        schedulers: Mapping[str, Any] = NO_SCHEDULERS,
    ) -> None:
        """
        Args:
            place: puts what the encode stage kept where this stage computes, each time it is asked for.
            schedulers: in place of the pipeline's own, by what requests call them.
        """
        self._pipe, self._place, self._schedulers = pipe, place, schedulers
        self.asked = call
        encoders = {name for name in pipe.components if name.startswith("text_encoder")}
        encoders |= {"image_encoder", CONNECTORS}
        self._stateful = [name for name in pipe.components if "scheduler" in name or "guider" in name]
        self._methods = encoding_names(pipe, frozenset(encoders))

    def __str__(self) -> str:
        return f"{type(self._pipe).__name__} with {type(self._pipe.scheduler).__name__}"

    def describe(self, request: GenerationRequest) -> str:
        """Which pipeline and scheduler draw it."""
        return f"{type(self._pipe).__name__} with {request.scheduler or type(self._pipe.scheduler).__name__}"

    def kept(self, method: str, value: Any) -> Any:
        """What is kept of what an encoding method returned: of what connectors alone read, the shapes."""
        return shapes_only(value) if CONNECTORS in self._methods and method != CONNECTORS else value

    def encode(
        self,
        request: GenerationRequest,
        replace: Callable[[str, Method], Method],
        encoders: Mapping[str, Any],
        *,
        pictures: Pictures = NO_PICTURES,
        max_sequence_length: int | None,
    ) -> None:
        """Up to the first forward of a denoiser.

        Args:
            replace: (name, encoding method of the pipeline) -> what is called in its place.
            encoders: what stands for text encoders, by name.
        """
        pipe = self._copy(request, blank(self._pipe.vae))
        vars(pipe).update(encoders)
        replace_encoding(pipe, self._methods, replace)
        with suppress(Reached):
            self._run(pipe, request, pictures, max_sequence_length)

    def prepare(
        self, request: GenerationRequest, encodings: Encodings, pictures: Pictures, encode: Encode
    ) -> None:
        """Up to the first forward of a denoiser. encode: what is called in place of `vae.encode`."""
        pipe = self._copy(request, encode)
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
        pipe = self._copy(request, encode or blank(self._pipe.vae))
        vars(pipe).update(components)
        if encodings is not None:
            self._replay(pipe, encodings)
        with watch_steps(pipe.scheduler, draws, after_step):
            return self._until_decode(pipe, request, pictures, max_sequence_length)

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
        pipe = self._copy(request, encode or blank(self._pipe.vae))
        vars(pipe).update(components)
        self._replay(pipe, encodings)
        vars(pipe.scheduler)["step"] = lambda *_, **__: _Step(latents, latents)
        return self._until_decode(pipe, request, pictures, None)

    def blank_pictures(self, request: GenerationRequest) -> Pictures:
        """Of the request's size, as many as it needs."""
        return blank_pictures(self.asked, request.size)

    def _copy(self, request: GenerationRequest, encode: Encode) -> Any:
        """encode: in place of the VAE's."""
        pipe = copy.copy(self._pipe)
        own = {name: getattr(self._pipe, name) for name in self._stateful}
        if request.scheduler is not None:
            own["scheduler"] = self._schedulers[request.scheduler]
        # Not by setattr, which would write each into the pipeline's config.
        vars(pipe).update({name: copy.deepcopy(part) for name, part in own.items()})
        vars(pipe)["vae"] = ChangedVae(self._pipe.vae, encode=encode)
        return pipe

    def _replay(self, pipe: Any, encodings: Encodings) -> None:
        left = deque(encodings)

        def replay(name: str, _: Method) -> Method:
            def replayed(*_: Any, **__: Any) -> Any:
                if not left or left[0][0] != name:
                    there = left[0][0] if left else "nothing"
                    raise RuntimeError(f"{self} calls {name} where the encode stage's called {there}")
                return self._place(without_shapes(left.popleft()[1]))

            return replayed

        replace_encoding(pipe, self._methods, replay)

    def _until_decode(
        self, pipe: Any, request: GenerationRequest, pictures: Pictures, max_sequence_length: int | None
    ) -> DecodeArguments:
        decodes = Decodes(self.asked.media)
        decodes.attach(pipe)
        with suppress(Reached):
            self._run(pipe, request, pictures, max_sequence_length)
        if decodes.arguments is None:
            raise RuntimeError(f"{self} ended without decoding anything")
        return decodes.arguments

    def _run(
        self, pipe: Any, request: GenerationRequest, pictures: Pictures, max_sequence_length: int | None
    ) -> None:
        """To its end, or to an exception: Reached, or a fault."""
        set_guidance(pipe, request.guidance_scale, request.guidance_scale_2)
        arguments = call_arguments(pipe, request, max_sequence_length)
        size = (request.width, request.height) if request.width else None
        pipe(**arguments | picture_arguments(self.asked, pictures, size))


def related_pipeline(pipe: Any, call: Call) -> Any:
    """Another class over the same components, as `from_pipe` makes it, without those that it does not know.

    Blocks choose by what they are called with.
    """
    if isinstance(pipe, ModularPipeline):
        return pipe
    pipeline_class = getattr(diffusers, call.pipeline_class)
    wanted = signature(pipeline_class.__init__).parameters
    related = pipeline_class(
        **{name: part for name, part in pipe.components.items() if name in wanted},
        **{name: value for name, value in pipe.config.items() if name in wanted and name not in pipe.components},
    )
    related.set_progress_bar_config(disable=True)
    return related


def call_arguments(
    pipe: Any, request: GenerationRequest, max_sequence_length: int | None = None
) -> dict[str, Any]:
    """What a pipeline is called with for a request: those of its fields that are set and that it knows.

    pipe: the pipeline, or its class where it is not modular.
    """
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
    parameters = call_names(pipe)
    known: dict[str, Any] = {
        name: value for name, value in values.items() if name in parameters and value is not None
    }
    if "guidance_schedule" in parameters and request.guidance_scale is not None:
        known["guidance_schedule"] = None  # its default, for so many steps, and a scale exclude each other
    return known


class _Step(NamedTuple):
    """As schedulers return it, as a tuple or with names."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor
