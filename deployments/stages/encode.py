"""Text to embeddings: diffusers' own pipeline call, until it asks a denoiser."""

import dataclasses
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from deployments.checkpoints.components import fetch_stage, left_out, stage_components
from deployments.checkpoints.geometry import with_geometry
from deployments.config import EncoderConfig, ModelConfig
from deployments.device import resolve_device, resolve_dtype
from deployments.embedding_cache import EmbeddingCache, Together
from deployments.engine.adapters import AdapterLayers, Applied
from deployments.memory.keeper import Keeper
from deployments.memory.on_demand import turn_to_load
from deployments.memory.share import take_share
from deployments.memory.spread import spread_models
from deployments.refusal import CannotServe, NotFinite, OutOfShare, WrongField, describe_cause
from deployments.request import Encodings, GenerationRequest, InputPictures, num_bytes
from deployments.stages.adapters import AdapterReader, AdapterStore, recall_adapters, using_adapters
from deployments.stages.blank import LEAST_TOKENS
from deployments.stages.call import CONNECTORS, Pictures, PipelineCalls
from deployments.stages.call_key import call_key
from deployments.stages.encoder_forwards import EncoderForward, EncoderForwards, stand_ins
from deployments.stages.encoding_methods import Method
from deployments.stages.finite import FiniteCheck, dtype_advice
from deployments.stages.lockstep import Ask, run_in_step
from deployments.stages.pictures import open_pictures
from deployments.stages.pipeline import load_pipeline, loaded_models
from deployments.stages.tensors import each_tensor, map_tensors, to_cpu, without_shapes
from deployments.warm_up import WarmUp, default_request, tried_size

log = logging.getLogger("ray.serve")


class _NotCached(Exception):
    """A text encoder, or what follows it, would have to run."""


class TextEncoding:
    """The checkpoint's text encoders and tokenizers.

    Not thread-safe but for `recall`: tokenizers keep their padding state.
    """

    def __init__(self, model: ModelConfig, config: EncoderConfig) -> None:
        torch.set_num_threads(config.num_threads)
        model = with_geometry(model)
        self._model, self._family, self._config = model, model.architecture, config
        self.finite = FiniteCheck()
        self.cache = EmbeddingCache(int(config.cache_mib * 2**20))
        self.num_forwards = 0
        """Calls of encoding methods that requests needed and the cache did not have."""
        self.num_shared = 0
        """Requests whose calls were made for others that came together with them."""
        self._max_sequence_length = config.max_sequence_length or self._family.max_sequence_length
        folder, index = fetch_stage(model, "encode", config.dtype)
        keep = stage_components(index, self._family, "encode")
        self._device = resolve_device(config)
        share = take_share(config, self._device)
        with turn_to_load(config, self._device), share.naming():
            self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant)
            models = loaded_models(self._pipe)
            if config.device_map is not None:
                spread_models(models, config)
            self.keeper = Keeper(models, config, self._device, config.device_map, share=share)
        self._calls = PipelineCalls(self._pipe, self._family.calls)
        layers = AdapterLayers(models, self._device, is_compiled=config.compile is not None)
        self._models, self._forwards = models, EncoderForwards(self.keeper.naming, layers)
        self.adapters: AdapterStore | None = None
        if model.takes_adapters:
            reader = AdapterReader(self._pipe, folder, index, resolve_dtype(config.dtype))
            self.adapters = AdapterStore(reader, layers, list(models), int(config.adapter_cache_mib * 2**20))
        if config.compile is None and not config.moves_weights:  # else it would cost what a request costs
            self._try(model, sorted(left_out(index)))
            self._forget_counts()

    @property
    def batch_sizes(self) -> Mapping[int, int]:
        """How many forwards of text encoders ran for so many prompts."""
        return self._forwards.batch_sizes

    def _forget_counts(self) -> None:
        """What no request has asked for."""
        self.finite, self.num_forwards, self.num_shared = FiniteCheck(), 0, 0
        self._forwards.batch_sizes.clear()

    def _try(self, model: ModelConfig, missing: Sequence[str]) -> None:
        """Raises CannotServe where no text could be encoded."""
        request, limit = default_request(model, tried_size(model.geometry)), self._max_sequence_length
        pictures, failed = self._calls.of(request).blank_pictures(request), list[Exception]()
        for length in dict.fromkeys((limit and min(limit, LEAST_TOKENS), limit)):  # some refuse to cut a text
            try:
                self._encode_alone(request, pictures, EmbeddingCache(0), length)
            except NotFinite:  # for this text; whoever asks for another may be served
                return
            except Exception as error:  # pipelines and tokenizers raise what they like
                failed.append(error)
            else:
                return
        parts = [name for name in missing if name.startswith(("text_encoder", "tokenizer"))]
        without = f"; the checkpoint leaves out {', '.join(parts)}" if parts else ""
        raise CannotServe(
            f"the encode stage cannot run {type(self._pipe).__name__}: {describe_cause(failed[-1])}{without}"
        ) from failed[-1]

    def warm_up(self, warm_up: WarmUp) -> None:
        """Texts of one length, or of any: sizes of pictures do not matter here."""
        for request in warm_up.requests:
            pictures = self._calls.of(request).blank_pictures(request)
            self._encode_alone(request, pictures, self.cache, self._max_sequence_length)
        self._forget_counts()

    def recall(self, request: GenerationRequest, pictures: InputPictures | None = None) -> Encodings | None:
        """What `encode` returns, if no text encoder need run for it. Thread-safe; takes a millisecond or so."""

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
        """What the pipeline's encoding methods return for a request, on the CPU. Raises NotFinite, WrongField."""
        return _raised(self.encode_together([(request, pictures)]))

    def encode_together(
        self, asked: Sequence[tuple[GenerationRequest, InputPictures | None]]
    ) -> list[Encodings | Exception]:
        """For each what `encode` returns or raises. Forwards of one shape are merged; equal ones run once."""
        made, length = Together(self.cache), self._max_sequence_length

        def encode(request: GenerationRequest, pictures: InputPictures | None, ask: Ask) -> Encodings:
            opened = open_pictures(pictures, request.size)
            try:
                return self._encode(request, opened, made, length, ask)
            except (NotFinite, OutOfShare, WrongField):
                raise
            except Exception as error:  # as in `_try`
                self._check_guidance(request, opened, ask, error)
                raise

        return self._in_step([partial(encode, *each) for each in asked])

    def _check_guidance(self, request: GenerationRequest, pictures: Pictures, ask: Ask, cause: Exception) -> None:
        """Raises WrongField where the same texts can be encoded for guidance alone (Wan's blocks)."""
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
            self._encode(guided, pictures, Together(EmbeddingCache(0)), self._max_sequence_length, ask)
        except Exception:  # so it is not for want of guidance
            return
        raise WrongField(
            f"{field}: {type(self._pipe).__name__} cannot draw without guidance: it fails at {scale:g}, and not "
            f"at {getattr(usual, field):g}, the default ({describe_cause(cause)})",
            field,
        ) from cause

    def _encode_alone(
        self, request: GenerationRequest, pictures: Pictures, cache: EmbeddingCache, length: int | None
    ) -> None:
        _raised(self._in_step([partial(self._encode, request, pictures, Together(cache), length)]))

    @torch.no_grad()
    def _in_step(self, calls: Sequence[Callable[[Ask], Encodings]]) -> list[Encodings | Exception]:
        """Text encoders run in this thread, all else of each call in one of its own."""

        def answer(questions: Sequence[EncoderForward | None]) -> list[Any]:
            made = iter(self._forwards.run([question for question in questions if question is not None]))
            return [question and next(made) for question in questions]

        try:
            with self.keeper.at_work():
                return run_in_step(calls, answer)
        finally:
            self.keeper.release()

    @torch.no_grad()
    def _encode(
        self, request: GenerationRequest, pictures: Pictures, made: Together, length: int | None, ask: Ask
    ) -> Encodings:
        call, recalls, is_shared = self._calls.of(request), True, True

        def answer(name: str, method: Method, key: Hashable, args: Any, kwargs: Any) -> Any:
            nonlocal is_shared
            value = made.get(key, wait=partial(ask, None)) if recalls else None
            if value is None:
                if any(tensor.is_meta for tensor in each_tensor((args, kwargs))):
                    raise _NotCached
                self.num_forwards += 1
                is_shared = False
                with made.making(key):
                    value = to_cpu(method(*args, **kwargs))
                    for tensor in each_tensor(value):
                        self.finite.check(tensor, partial(self._explain, name))
                    kept = call.kept(name, value)
                    made.put(key, kept, num_bytes(kept))
            return value

        with self.keeper.naming(), using_adapters(self.adapters, request.adapters) as adapters:
            encoders = stand_ins(self._models, ask, adapters)
            with suppress(_NotCached):
                encodings = self._run(request, pictures, encoders, answer, length, adapters)
                self.num_shared += is_shared
                return encodings
            recalls = False  # what the connectors read was kept without its values
            return self._run(request, pictures, encoders, answer, length, adapters)

    def _run(
        self,
        request: GenerationRequest,
        pictures: Pictures,
        encoders: Mapping[str, Any],
        answer: Callable[..., Any],
        max_sequence_length: int | None,
        adapters: Applied,
    ) -> Encodings:
        """encoders: what stands for text encoders, by name.
        answer: (name of an encoding method, the method, its call's key, its arguments) -> CPU tensors.

        What else fails in the pipeline's call fails in the denoise stage too, which knows what to say of it.
        """
        call = self._calls.of(request)
        made: list[tuple[str, Any]] = []
        keys: list[Hashable] = []
        failed: list[Exception] = []

        def replace(name: str, method: Method) -> Method:
            def encode(*args: Any, **kwargs: Any) -> Any:
                follows = name == CONNECTORS  # what it reads is a GiB, and follows from what was encoded before
                given: tuple[Any, Any] = ((), {}) if follows else (args, kwargs)
                key = call_key(f"{request.kind} {name}", *given)
                keys.append((key, adapters, tuple(keys) if follows else ()))
                try:
                    value = answer(name, method, keys[-1], args, kwargs)
                except Exception as error:
                    failed.append(error)
                    raise
                made.append((name, call.kept(name, value)))
                # The rest of the call expects it there.
                return map_tensors(lambda one: one if one.is_meta else one.to(self._device), without_shapes(value))

            return encode

        try:
            call.encode(request, replace, encoders, pictures=pictures, max_sequence_length=max_sequence_length)
        except Exception as error:
            if error in failed:
                raise
            log.debug("%s fails behind its text encoders: %s", call, error)
        return tuple(made)

    def _explain(self, name: str) -> str:
        advice = dtype_advice("encoder.dtype", resolve_dtype(self._config.dtype))
        return f"what {name} of {type(self._pipe).__name__} returned is NaN or infinite: {advice}"


def _raised(outcomes: Sequence[Encodings | Exception]) -> Encodings:
    """The only one."""
    [outcome] = outcomes
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
