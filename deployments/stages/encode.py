"""The encode stage: runs diffusers' own pipeline call until it calls a denoiser."""

import dataclasses
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from deployments.answers import Encoded, Encodings, num_bytes
from deployments.checkpoints.components import fetch_stage, left_out, stage_components
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.sharing import check_same
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.engine.adapters import AdapterLayers, Applied
from deployments.errors import CannotServe, NonFinite, OutOfDeviceMemory, WrongField, describe_cause
from deployments.memory.device import resolve_device, resolve_dtype
from deployments.memory.residency import WeightResidency
from deployments.memory.share import take_share
from deployments.memory.spread import spread_models
from deployments.memory.time_sharing import lease_to_load
from deployments.request import GenerationRequest, InputPictures
from deployments.stages.adapters import AdapterReader, AdapterStore, recall_adapters, using_adapters
from deployments.stages.batch_memo import BatchMemo
from deployments.stages.call import Pictures, PipelineCalls
from deployments.stages.finite import FiniteCheck, dtype_advice
from deployments.stages.pipeline import load_pipeline, loaded_models
from deployments.stages.pixels.pictures import open_pictures
from deployments.stages.result_cache import ResultCache
from deployments.stages.tensors import each_tensor, to_cpu
from deployments.stages.texts.encoder_forwards import EncoderForward, EncoderForwards, encoder_stand_ins
from deployments.stages.texts.encoding_methods import Method
from deployments.stages.texts.lockstep import Ask, run_in_step
from deployments.stages.texts.recording import Answer, Recording
from deployments.stages.texts.truncation import TokenizerWatch, truncation_warnings
from deployments.stages.texts.weighting import PromptWeighting
from deployments.stages.trials.blank import LEAST_TOKENS
from deployments.stages.warm_up import WarmUp, default_request, tried_size

log = logging.getLogger("ray.serve")


class _NotCached(Exception):
    """Raised if a text encoder, or what follows it, would have to run."""


class TextEncoding:
    """The checkpoint's text encoders and tokenizers.

    Not thread-safe except for `recall`, because tokenizers keep padding state.
    """

    def __init__(
        self, model: ModelConfig, config: EncoderConfig, owner: "tuple[ModelConfig, TextEncoding] | None" = None
    ) -> None:
        """owner: another checkpoint that has loaded the same text encoders. Raises NotTheSame if they differ."""
        torch.set_num_threads(config.num_threads)
        model = with_geometry(model)
        self._model, self._family, self._config = model, model.architecture, config
        self.finite = FiniteCheck()
        self.cache: ResultCache = ResultCache(int(config.cache_mib * 2**20)) if owner is None else owner[1].cache
        self.num_forwards = 0
        """Calls of encoding methods that requests needed and the cache did not have."""
        self.num_shared = 0
        """Requests that needed no call of their own, because other requests of their batch made the same calls."""
        self._max_sequence_length = config.max_sequence_length or self._family.max_sequence_length
        folder, index = fetch_stage(model, "encode", config.dtype)
        keep = stage_components(index, self._family, "encode")
        self._device = resolve_device(config)
        if owner is None:
            share = take_share(config, self._device)
            with lease_to_load(config, self._device), share.translating_oom():
                self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant)
                models = loaded_models(self._pipe)
                if config.device_map is not None:
                    spread_models(models, config)
                self.residency = WeightResidency(models, config, self._device, config.device_map, share=share)
        else:
            check_same(owner[0], model, "encode", config.dtype)
            models, self.residency = owner[1]._models, owner[1].residency
            self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant, held=models)
        self._calls = PipelineCalls(self._pipe, self._family.calls, schedulers=model.schedulers)
        layers = AdapterLayers(models, self._device, is_compiled=config.compile is not None)
        self._models: dict[str, torch.nn.Module] = models
        self._forwards = EncoderForwards(self.residency.translating_oom, layers)
        self.adapters: AdapterStore | None = None
        if model.takes_adapters:
            reader = AdapterReader(self._pipe, folder, index, resolve_dtype(config.dtype))
            self.adapters = AdapterStore(reader, layers, list(models), int(config.adapter_cache_mib * 2**20))
        self._weighting = PromptWeighting(self._pipe, self._device) if model.prompt_weighting else None
        if config.compile is None and not config.moves_weights:  # or it would cost as much as a request
            self._try(model, sorted(left_out(index)))
            self._forget_counts()

    @property
    def batch_sizes(self) -> Mapping[int, int]:
        """Number of text encoder forwards by their number of prompts."""
        return self._forwards.batch_sizes

    def _forget_counts(self) -> None:
        """Resets the counts after calls that no request needed."""
        self.finite, self.num_forwards, self.num_shared = FiniteCheck(), 0, 0
        self._forwards.batch_sizes.clear()

    def _try(self, model: ModelConfig, missing: Sequence[str]) -> None:
        """Encodes an empty text. Raises CannotServe if no text could be encoded."""
        request, limit = default_request(model, tried_size(model.geometry)), self._max_sequence_length
        pictures, failed = self._calls.of(request).blank_pictures(request), list[Exception]()
        for length in dict.fromkeys((limit and min(limit, LEAST_TOKENS), limit)):  # pipelines may refuse to cut
            try:
                self._encode_alone(request, pictures, ResultCache(0), length)
            except NonFinite:  # for this text; others may work
                return
            except Exception as error:  # pipelines and tokenizers may raise anything
                failed.append(error)
            else:
                return
        parts = [name for name in missing if name.startswith(("text_encoder", "tokenizer"))]
        without = f"; the checkpoint leaves out {', '.join(parts)}" if parts else ""
        raise CannotServe(
            f"the encode stage cannot run {type(self._pipe).__name__}: {describe_cause(failed[-1])}{without}"
        ) from failed[-1]

    def warm_up(self, warm_up: WarmUp) -> None:
        """Encodes the texts of the blank requests, at the configured length if there is one."""
        for request in warm_up.requests:
            pictures = self._calls.of(request).blank_pictures(request)
            self._encode_alone(request, pictures, self.cache, self._max_sequence_length)
        self._forget_counts()

    def recall(self, request: GenerationRequest, pictures: InputPictures | None = None) -> Encoded | None:
        """Returns what `encode_together` would if no text encoder need run for it, else None. Thread-safe; takes
        about a millisecond."""

        def answer(name: str, _method: Method, key: Hashable, _args: Any, _kwargs: Any) -> Any:
            value = self.cache.get(key)
            if value is None:
                raise _NotCached
            return value

        adapters = recall_adapters(self.adapters, request.adapters)
        if adapters is None:
            return None
        opened = open_pictures(pictures, request.size)
        try:
            return self._run(request, opened, {}, answer, self._max_sequence_length, adapters)
        except _NotCached:
            return None

    def encode(self, request: GenerationRequest, pictures: InputPictures | None = None) -> Encodings:
        """Returns the results of the pipeline's encoding methods, on the CPU. Raises NonFinite, WrongField."""
        return _raised(self.encode_together([(request, pictures)])).encodings

    def encode_together(
        self, asked: Sequence[tuple[GenerationRequest, InputPictures | None]]
    ) -> list[Encoded | Exception]:
        """Returns a result or an exception for each request. Merges forwards of one shape; equal ones run once."""
        made, length = BatchMemo(self.cache), self._max_sequence_length

        def encode(request: GenerationRequest, pictures: InputPictures | None, ask: Ask) -> Encoded:
            opened = open_pictures(pictures, request.size)
            try:
                return self._encode(request, opened, made, length, ask)
            except (NonFinite, OutOfDeviceMemory, WrongField):
                raise
            except Exception as error:  # as in `_try`
                self._check_guidance(request, opened, ask, error)
                raise

        return self._in_step([partial(encode, *each) for each in asked])

    def _check_guidance(self, request: GenerationRequest, pictures: Pictures, ask: Ask, cause: Exception) -> None:
        """Raises WrongField if the same texts can be encoded, but only with guidance (Wan's blocks)."""
        call = self._calls.of(request).asked
        usual, field = default_request(self._model, request.size, call=call), call.guidance
        scale = getattr(request, field)
        if scale is None or scale > 1 or not usual.prompt.is_guided:
            return
        guided = dataclasses.replace(
            request,
            prompt=dataclasses.replace(request.prompt, is_guided=True),
            guidance_scale=usual.guidance_scale,
            true_cfg_scale=usual.true_cfg_scale,
        )
        try:
            self._encode(guided, pictures, BatchMemo(ResultCache(0)), self._max_sequence_length, ask)
        except Exception:  # so missing guidance is not the cause
            return
        raise WrongField(
            f"{field}: {type(self._pipe).__name__} cannot draw without guidance: it fails at {scale:g}, but not "
            f"at {getattr(usual, field):g}, the default ({describe_cause(cause)})",
            field,
        ) from cause

    def _encode_alone(
        self, request: GenerationRequest, pictures: Pictures, cache: ResultCache, length: int | None
    ) -> None:
        _raised(self._in_step([partial(self._encode, request, pictures, BatchMemo(cache), length)]))

    @torch.no_grad()
    def _in_step(self, calls: Sequence[Callable[[Ask], Encoded]]) -> list[Encoded | Exception]:
        """Runs calls in lockstep: text encoders in this thread, the rest of each call in a thread of its own."""

        def answer(questions: Sequence[EncoderForward | None]) -> list[Any]:
            made = iter(self._forwards.run([question for question in questions if question is not None]))
            return [question and next(made) for question in questions]

        try:
            with self.residency.on_device():
                return run_in_step(calls, answer)
        finally:
            self.residency.release()

    @torch.no_grad()
    def _encode(
        self, request: GenerationRequest, pictures: Pictures, made: BatchMemo, length: int | None, ask: Ask
    ) -> Encoded:
        call, recalls, is_shared = self._calls.of(request), True, True
        watch = TokenizerWatch(self._pipe, request.prompt)

        def answer(name: str, method: Method, key: Hashable, args: Any, kwargs: Any) -> Any:
            nonlocal is_shared
            value = made.get(key, wait=partial(ask, None)) if recalls else None
            if value is None:
                if any(tensor.is_meta for tensor in each_tensor((args, kwargs))):
                    raise _NotCached
                self.num_forwards += 1
                is_shared = False
                if self._weighting is not None and request.prompt.is_weighted:
                    method = self._weighting.weighed(method)
                with made.making(key):
                    value = to_cpu(method(*args, **kwargs))
                    for tensor in each_tensor(value):
                        self.finite.check(tensor, partial(self._explain, name))
                    kept = call.kept(name, value)
                    readings = watch.take(kwargs, value)
                    made.put(key, (kept, readings), num_bytes(kept))
                    return value, readings
            return value

        with self.residency.translating_oom(), using_adapters(self.adapters, request.adapters) as adapters:
            encoders = encoder_stand_ins(self._models, ask, adapters)
            if not request.prompt.is_weighted:  # weighted prompts are read whole
                encoders |= watch.components
            with suppress(_NotCached):
                encoded = self._run(request, pictures, encoders, answer, length, adapters)
                self.num_shared += is_shared
                return encoded
            recalls = False  # the cache keeps what the connectors read without its values
            return self._run(request, pictures, encoders, answer, length, adapters)

    def _run(
        self,
        request: GenerationRequest,
        pictures: Pictures,
        encoders: Mapping[str, Any],
        answer: Answer,
        max_sequence_length: int | None,
        adapters: Applied,
    ) -> Encoded:
        """Runs the pipeline's call, in which `answer` replaces its encoding methods; returns what they return.

        Errors in the rest of the call are ignored: they occur in the denoise stage too, which can explain them.

        encoders: stand-ins for text encoders and tokenizers, by name.
        """
        call = self._calls.of(request)
        recording = Recording(call, request, adapters, answer, model=self._model.name)
        try:
            call.encode(
                request,
                partial(recording.replace, self._device),
                encoders,
                pictures=pictures,
                max_sequence_length=max_sequence_length,
            )
        except Exception as error:
            if error in recording.failed:
                raise
            log.debug("%s fails after its text encoders: %s", call, error)
        return Encoded(tuple(recording.made), truncation_warnings(request.prompt, recording.read))

    def _explain(self, name: str) -> str:
        advice = dtype_advice("encoder.dtype", resolve_dtype(self._config.dtype))
        return f"what {name} of {type(self._pipe).__name__} returned is NaN or infinite: {advice}"


def _raised(outcomes: Sequence[Encoded | Exception]) -> Encoded:
    """Returns the only outcome, or raises it if it is an exception."""
    [outcome] = outcomes
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
