"""Diffusers' own pipeline call, of which each stage runs its part.

encode   runs until a denoiser is called; keeps the results of methods that use a text encoder
prepare  (with input images) replays those results, runs just as far, and keeps the results of `vae.encode`
denoise  replays both, and runs until all decodes of the VAEs have been called; returns their arguments
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

from deployments.answers import DecodeArguments, Encodings
from deployments.errors import WrongField, describe_cause
from deployments.families import Call
from deployments.options.schedulers import SchedulerConfig
from deployments.request import CallKind, GenerationRequest
from deployments.stages.call_arguments import call_arguments
from deployments.stages.loop.draws import Draws
from deployments.stages.loop.schedulers import build_schedulers
from deployments.stages.loop.steps import AfterStep, watch_steps
from deployments.stages.modular import set_guidance
from deployments.stages.pixels.decodes import Decodes
from deployments.stages.pixels.pictures import blank_pictures, picture_arguments
from deployments.stages.pixels.posterior import ChangedVae, Encode, blank
from deployments.stages.stub import Reached
from deployments.stages.tensors import shapes_only, without_shapes
from deployments.stages.texts.encoding_methods import Method, encoding_names, replace_encoding

log = logging.getLogger("ray.serve")
CONNECTORS = "connectors"
"""The component that turns all hidden states of a text encoder (a GiB for LTX-2) into a denoiser's inputs."""
Pictures = Mapping[str, Any]
"""`image` (a list), `mask_image`, `control_image` and `video` (a list), as opened by pictures.py."""
NO_PICTURES: Pictures = {}
NO_SCHEDULERS: Mapping[str, Any] = {}


class PipelineCalls:
    """All kinds of call of one checkpoint."""

    def __init__(
        self,
        pipe: Any,
        calls: Mapping[CallKind, Call],
        to_stage: Callable[[Any], Any] = lambda value: value,
        schedulers: Sequence[SchedulerConfig] = (),
    ) -> None:
        """
        Args:
            pipe: the checkpoint's own pipeline; pipelines of other kinds are made from its components.
            to_stage: as for PipelineCall.
            schedulers: those that requests may ask for. Raises CannotServe if one cannot be built.
        """
        first, *others = calls.values()
        built = build_schedulers(pipe, schedulers)
        self._calls = {first.kind: PipelineCall(pipe, first, to_stage, built)}
        for call in others:
            try:
                self._calls[call.kind] = PipelineCall(related_pipeline(pipe, call), call, to_stage, built)
            except Exception as error:  # constructors may raise anything
                log.warning(
                    "no %s can be built from these components: %s", call.pipeline_class, describe_cause(error)
                )

    def of(self, request: GenerationRequest) -> "PipelineCall":
        """Returns the call of the request's kind. Raises WrongField if the checkpoint has none."""
        if request.kind not in self._calls:
            raise WrongField(f"this checkpoint cannot {request.kind}: the log of its start says why", "model")
        return self._calls[request.kind]

    def __iter__(self) -> Iterator["PipelineCall"]:
        return iter(self._calls.values())


class PipelineCall:
    """One pipeline's call, with stubs for the models that this stage lacks. Thread-safe.

    Every request has a shallow copy of the pipeline, and its own scheduler and guiders, because these have state.
    So every scheduler and guidance mode of diffusers works, and the result is the pipeline's.
    """

    def __init__(
        self,
        pipe: Any,
        call: Call,
        to_stage: Callable[[Any], Any] = lambda value: value,
        schedulers: Mapping[str, Any] = NO_SCHEDULERS,
    ) -> None:
        """
        Args:
            to_stage: moves what the encode stage kept to this stage's device, each time that it is read.
            schedulers: schedulers to use instead of the pipeline's own, by their names in requests.
        """
        self._pipe, self._to_stage, self._schedulers = pipe, to_stage, schedulers
        self.asked = call
        encoders = {name for name in pipe.components if name.startswith("text_encoder")}
        encoders |= {"image_encoder", CONNECTORS}
        self._stateful = [name for name in pipe.components if "scheduler" in name or "guider" in name]
        self._methods = encoding_names(pipe, frozenset(encoders))

    def __str__(self) -> str:
        return f"{type(self._pipe).__name__} with {type(self._pipe.scheduler).__name__}"

    def describe(self, request: GenerationRequest) -> str:
        """Returns the names of the pipeline and the scheduler that serve the request."""
        return f"{type(self._pipe).__name__} with {request.scheduler or type(self._pipe.scheduler).__name__}"

    def kept(self, method: str, value: Any) -> Any:
        """Returns what is kept of an encoding method's result: only shapes, if only connectors read it."""
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
        """Runs the call up to the first forward of a denoiser.

        Args:
            replace: (name, encoding method of the pipeline) -> the function to call in its place.
            encoders: stand-ins for text encoders, by name.
        """
        pipe = self._copy(request, blank(self._pipe.vae))
        vars(pipe).update(encoders)
        replace_encoding(pipe, self._methods, replace)
        with suppress(Reached):
            self._run(pipe, request, pictures, max_sequence_length)

    def prepare(
        self, request: GenerationRequest, encodings: Encodings, pictures: Pictures, encode: Encode
    ) -> None:
        """Runs the call up to the first forward of a denoiser. encode: replaces `vae.encode`."""
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
        """Runs the call up to the decode; returns what the pipeline decodes.

        Args:
            components: stand-ins for the denoisers, by name; without encodings, for the text models too.
            encodings: what the encode stage kept; None: the pipeline's own encoding runs.
            encode: called in place of `vae.encode`; None: it returns zeros.
            pictures: the input images.
            draws: random state for schedulers that get no generator.
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
        """Returns what the pipeline would decode if these were the latents after its last step.

        components: denoisers that predict nothing and cost nothing.
        """
        pipe = self._copy(request, encode or blank(self._pipe.vae))
        vars(pipe).update(components)
        self._replay(pipe, encodings)
        vars(pipe.scheduler)["step"] = lambda *_, **__: _Step(latents, latents)
        return self._until_decode(pipe, request, pictures, None)

    def blank_pictures(self, request: GenerationRequest) -> Pictures:
        """Returns blank images of the request's size, as many as its call needs."""
        return blank_pictures(self.asked, request.size)

    def _copy(self, request: GenerationRequest, encode: Encode) -> Any:
        """Copies the pipeline for one request. encode: replaces `vae.encode`."""
        pipe = copy.copy(self._pipe)
        own = {name: getattr(self._pipe, name) for name in self._stateful}
        if request.scheduler is not None:
            own["scheduler"] = self._schedulers[request.scheduler]
        # setattr would write each of them into the pipeline's config.
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
                return self._to_stage(without_shapes(left.popleft()[1]))

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
        """Runs the pipeline to its end or an exception: Reached, or a fault."""
        set_guidance(pipe, request.guidance_scale, request.guidance_scale_2)
        arguments = call_arguments(pipe, request, max_sequence_length)
        size = (request.width, request.height) if request.width else None
        pipe(**arguments | picture_arguments(self.asked, pictures, size))


def related_pipeline(pipe: Any, call: Call) -> Any:
    """Builds a pipeline of another class from the same components, as `from_pipe` does, without unknown ones.

    A modular pipeline serves all kinds itself: its blocks choose by the call's arguments.
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


class _Step(NamedTuple):
    """A scheduler step's result: a tuple with names."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor
