"""Noise to latents: diffusers' own pipeline call, driven over stand-ins for its denoisers.

Every request runs in a thread of its own. What the result is, is the pipeline's by construction.
"""

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cluster import accelerator
from cluster.object_store_transport import open_mailboxes
from cluster.open_transport import open_rings
from cluster.place import Place, Rendezvous, plan_backend
from cluster.ring import no_peers
from cluster.transport import open_store
from deployments.checkpoints.components import VAES, weightless
from deployments.checkpoints.geometry import read_geometry, with_geometry
from deployments.config import ModelConfig, TransformerConfig
from deployments.device import resolve_dtype
from deployments.engine.blocks import shape_only_inputs
from deployments.engine.engine import Engine
from deployments.engine.load import load_rank, open_denoisers, open_parallel
from deployments.engine.merge import build_mergers, patch_size, takes_any_length
from deployments.engine.outline import Outliner
from deployments.engine.passes import Passes
from deployments.engine.seat import Seat
from deployments.engine.stand_in import Submit, stand_ins
from deployments.engine.step_cache import StepCache
from deployments.engine.work import Leader
from deployments.refusal import CannotServe, WrongField, describe_cause
from deployments.request import (
    DecodeArguments,
    Encodings,
    ForwardCounts,
    GenerationRequest,
    InputPictures,
    Posteriors,
)
from deployments.stages.adapters import AdapterReader, AdapterStore, using_adapters
from deployments.stages.blank import BlankTexts
from deployments.stages.call import Pictures, PipelineCalls
from deployments.stages.draws import Draws
from deployments.stages.finite import FiniteCheck, dtype_advice
from deployments.stages.follow import rank_stats
from deployments.stages.foresee import ForwardForesight
from deployments.stages.partial import PartialLatents
from deployments.stages.pictures import open_pictures
from deployments.stages.pipeline import load_pipeline
from deployments.stages.posterior import Encode, replay
from deployments.stages.steps import AfterStep
from deployments.stages.tensors import each_tensor, lies_channels_last, to_cpu, to_device
from deployments.stages.trial import Trial
from deployments.stages.zeros import Zeros
from deployments.stats import TransformerStats
from deployments.warm_up import WarmUp

OnStep = Callable[[int, torch.Tensor], None]
"""(steps done, latents after them), after every timestep: some schedulers have several to a step."""
OnPartial = Callable[[int, DecodeArguments], None]
"""(partial_image_index, what the pipeline would decode if the request ended here)"""
OnForwards = Callable[[ForwardCounts], None]
"""Once, when all are done."""

PIPELINE_ERRORS = (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError)
"""What pipelines and schedulers raise of a field that they cannot take; and others of much else."""


class Denoising:
    """The checkpoint's scheduler and rank 0's shards of its denoisers. Thread-safe once connected."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, listening: socket.socket | None = None
    ) -> None:
        """listening: where those that share rank 0's forwards, and all other ranks, meet it, if any do."""
        torch.set_num_threads(config.num_threads)
        self._store = None if listening is None else open_store(listening, config.num_ranks)
        model = with_geometry(model)
        self._family, self._config = model.architecture, config
        self._denoisers = open_denoisers(model, config)
        self._check_geometry(model)
        folder, index = self._denoisers.folder, self._denoisers.index
        pipe = load_pipeline(folder, index, weightless(index), config, variant=model.variant)
        for vae in filter(None, map(pipe.components.get, VAES)):
            vae.dtype = resolve_dtype(model.vae_dtype or config.dtype)
        # Not once for the whole request: many a pipeline joins what it gets, and has no more need of it.
        place = partial(to_device, device=self._denoisers.device, dtype=self._denoisers.dtype)
        self._calls = PipelineCalls(pipe, self._family.calls, place)
        self._zeros = Zeros(self._denoisers.skeletons)
        self._blank = BlankTexts(folder, index, self._denoisers.dtype)
        self._trial = Trial(self._calls, pipe, self._blank, model, self._denoisers)
        self._draws_noise = self._trial.start()
        self.pending_kinds = self._trial.takes_pending() if config.runs_passes_at_once else frozenset()
        """Of call, whose forwards may be under way before the pipeline needs the one before."""
        self.finite = FiniteCheck()
        self._group, parallel = open_parallel(self._denoisers, config, 0, self._store)
        self.loaded = load_rank(self._denoisers, model, config, 0, parallel)
        self.adapters: AdapterStore | None = None
        if model.takes_adapters:
            reader = AdapterReader(pipe, folder, index, self._denoisers.dtype)
            names, limit = list(self._denoisers.skeletons), int(config.adapter_cache_mib * 2**20)
            self.adapters = AdapterStore(reader, self.loaded.adapters, names, limit)
        # Who waits for a copy of its own does not wait for the forward of another that is under way.
        self._stream = accelerator.open_stream(self._denoisers.device, priority=-1)

    def _check_geometry(self, model: ModelConfig) -> None:
        """Requests were judged where the app was built, perhaps without this checkpoint. Raises CannotServe."""
        found = read_geometry(self._denoisers.folder, self._family)
        if found != model.geometry:
            raise CannotServe(
                f"the app was built for sizes that {self._denoisers.folder} does not make: {model.geometry}; its "
                f"configs say {found}. Build it where model_index.json and every config.json can be read"
            )

    def open_rendezvous(self, host: str, places: Sequence[Place]) -> Rendezvous:
        """Where the other ranks are to meet this one. host: an address of its node that they can reach."""
        num_ranks, degree = len(places), self._config.parallel_degree
        if self._config.transport == "object_store":
            return Rendezvous(num_ranks, "object_store", mailboxes=open_mailboxes(num_ranks))
        if self._store is None:
            self._store = open_store(host, num_ranks)
        backend = plan_backend(places) if accelerator.has_nccl(self._denoisers.device) else "gloo"
        return Rendezvous(num_ranks, backend, host, self._store.port, degree=degree)

    def connect(self, rendezvous: Rendezvous | None, on_lost: Callable[[BaseException], None]) -> None:
        """Meet the other ranks, if there are any, and begin to work. on_lost: the group is no more."""
        device, skeletons = self._denoisers.device, self._denoisers.skeletons
        transport, peers = open_rings(rendezvous, device=device, store=self._store)
        mergers = build_mergers(skeletons)
        shape_only = {name: shape_only_inputs(skeleton) for name, skeleton in skeletons.items()}
        needs = self.loaded.keeper.needs
        is_limited = needs.is_limited
        self.engine = Engine(
            Leader(self.loaded, mergers, Outliner(), shape_only, self.loaded.keeper.release),
            mergers,
            self._config,
            device=device,
            transport=transport,
            peers=peers,
            agree=no_peers if self._group is None else self._group.agree,
            patch_sizes={name: patch_size(skeleton) for name, skeleton in skeletons.items()},
            needs=needs if is_limited else None,
            foresee=ForwardForesight(self._denoisers, self._config) if is_limited else None,
            adapter_bytes=lambda: self.loaded.adapters.num_bytes,
            on_lost=on_lost,
        )

    def warm_up(self, warm_up: WarmUp) -> None:
        """Blank texts through all ranks, for every size. Once connected."""
        longest = warm_up.max_sequence_length or self._family.max_sequence_length
        lengths = [longest]
        classes = {type(skeleton).__name__ for skeleton in self._denoisers.skeletons.values()}
        if longest is not None and any(map(takes_any_length, classes)):
            lengths.append(max(2, longest // 2))  # then torch compiles for any
        for request in map(self._trial.with_all_asked, warm_up.requests):
            for length in lengths:
                seat = self.join()
                try:
                    self.denoise(seat, None, request, max_sequence_length=length)
                finally:
                    self.leave(seat)

    def join(self) -> Seat:
        """A seat for one request; `leave` frees it."""
        return self.engine.queue.join()

    def leave(self, seat: Seat) -> None:
        """Ends the request: if it still runs, its thread gets Cancelled at the next step."""
        self.engine.queue.leave(seat)

    @property
    def load(self) -> float:
        """Of the step queue: 1 fills all that may fly at once."""
        return self.engine.queue.stats().load

    def stats(self) -> TransformerStats:
        """With rank 0 alone; the other ranks tell of themselves."""
        ring = self.engine.stats()
        rank_0 = rank_stats(0, self._denoisers, self.loaded, ring)
        adapters = () if self.adapters is None else tuple(self.adapters.names)
        return TransformerStats(self.engine.queue.stats(), (rank_0,), adapters, ring.occupied_s or 0.0)

    def close(self) -> None:
        """An orderly end."""
        self.engine.close()

    @torch.no_grad()
    def denoise(
        self,
        seat: Seat,
        encodings: Encodings | None,
        request: GenerationRequest,
        on_step: OnStep = lambda _step, _latents: None,
        num_partial_images: int = 0,
        on_partial: OnPartial | None = None,
        *,
        posteriors: Posteriors = (),
        pictures: InputPictures | None = None,
        max_sequence_length: int | None = None,
        on_forwards: OnForwards = lambda _counts: None,
    ) -> DecodeArguments:
        """What the pipeline's VAE is to decode, on the CPU. Blocks.

        Args:
            encodings: the encode stage's; None: blank ones, as long as max_sequence_length lets them be, and
                blank pictures where some are to go in.
            posteriors: the decode stage's, of `pictures`.

        Raises Cancelled, WrongField, NotFinite, OutOfShare, or what the engine does.
        """
        with (
            self.loaded.keeper.naming(),
            accelerator.on_stream(self._stream),
            using_adapters(self.adapters, request.adapters) as adapters,
        ):
            begin = partial(self.engine.begin, seat, adapters=adapters)
            cache = StepCache(request.step_cache, begin, partial(self.engine.queue.keep, seat))
            components = self._stand_ins(self._submit(cache, request))
            opened: Pictures = open_pictures(pictures, request.size)
            encode: Encode | None = None
            if encodings is None:
                components |= self._blank.on(self._denoisers.device)
                opened = self._calls.of(request).blank_pictures(request)
            elif opened:
                encode = self._replay(posteriors)
            call = self._calls.of(request)
            try:
                arguments = call.denoise(
                    request,
                    components,
                    encodings,
                    encode=encode,
                    pictures=opened,
                    draws=Draws(request.seed, self._denoisers.device) if self._draws_noise else None,
                    after_step=self._after_step(
                        cache, request, encodings, posteriors, opened, on_step, num_partial_images, on_partial
                    ),
                    max_sequence_length=max_sequence_length,
                )
            except PIPELINE_ERRORS as error:
                field = self._trial.find_fault(request, opened)
                if field is None:
                    raise
                if field == "image" and pictures is not None:
                    field = pictures.field
                message = f"{call} does not take this {field}: {describe_cause(error)}"
                raise WrongField(message, field) from error
            on_forwards(cache.counts)
            for tensor in each_tensor(arguments.values):
                self.finite.check(tensor, partial(self._explain, request))
            return _to_cpu(arguments)

    def _after_step(
        self,
        cache: StepCache,
        request: GenerationRequest,
        encodings: Encodings | None,
        posteriors: Posteriors,
        pictures: Pictures,
        on_step: OnStep,
        num_partial_images: int,
        on_partial: OnPartial | None,
    ) -> AfterStep:
        """What a request does between its steps."""

        def finish(index: int, latents: torch.Tensor) -> None:
            assert on_partial is not None
            assert encodings is not None
            arguments = self._calls.of(request).finish(
                request,
                self._stand_ins(self._zeros),
                encodings,
                latents,
                encode=self._replay(posteriors),
                pictures=pictures,
            )
            on_partial(index, _to_cpu(arguments))

        partials = PartialLatents(num_partial_images, finish)

        def after_step(scheduler: Any, index: int, latents: torch.Tensor) -> None:
            cache.after_step(scheduler, index)
            on_step(_num_done(scheduler, index, request.num_inference_steps), latents)
            if on_partial is not None:
                partials.after_step(scheduler, index, latents)

        return after_step

    def _replay(self, posteriors: Posteriors) -> Encode:
        """The pipeline's own code casts what it draws from them."""
        return replay(posteriors, self._denoisers.device)

    def _submit(self, cache: StepCache, request: GenerationRequest) -> Submit:
        """What answers the request's forwards."""
        if request.kind in self.pending_kinds:
            return Passes(cache.begin)
        return lambda component, inputs: cache.begin(0, component, inputs)()

    def _stand_ins(self, submit: Submit) -> dict[str, Any]:
        """For the pipeline's denoisers."""
        of = self._denoisers
        return dict(stand_ins(of.skeletons, dtype=of.dtype, device=of.device, submit=submit))

    def _explain(self, request: GenerationRequest) -> str:
        """Why latents are no numbers."""
        call, steps = self._calls.of(request), request.num_inference_steps
        what = f"the latents are NaN or infinite after {steps} steps of {call}"
        if not self._trial.is_finite(request):
            return (
                f"{what}, whatever the model predicts: its scheduler divides by zero. Ask for more "
                "num_inference_steps, or check prediction_type and rescale_betas_zero_snr in its config"
            )
        return f"{what}: {dtype_advice('transformer.dtype', self._denoisers.dtype)}"


def _num_done(scheduler: Any, index: int, num_inference_steps: int) -> int:
    """Of the request's steps, after timestep `index`, as the pipelines' progress bars count: PNDM and Heun have
    more timesteps than steps."""
    num_done: int = (index + 1 - len(scheduler.timesteps)) // scheduler.order + num_inference_steps
    return max(0, num_done)


def _to_cpu(of: DecodeArguments) -> DecodeArguments:
    return DecodeArguments(
        to_cpu(of.args),
        to_cpu(of.kwargs),
        is_channels_last=lies_channels_last(of.latents),
        more=tuple(map(_to_cpu, of.more)),
        sound=None if of.sound is None else _to_cpu(of.sound),
    )
