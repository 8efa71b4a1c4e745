"""The denoise stage: runs diffusers' own pipeline call with stand-ins for its denoisers.

Every request runs in a thread of its own. The result is the pipeline's by construction.
"""

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cluster.machines import accelerator
from cluster.ranks.object_store_transport import open_mailboxes
from cluster.ranks.open_transport import open_rings
from cluster.ranks.place import Place, Rendezvous, plan_backend
from cluster.ranks.ring import no_peers
from cluster.ranks.transport import open_store
from deployments.answers import DecodeArguments, Encodings, ForwardCounts, JournalPart, Posteriors
from deployments.checkpoints.components import VAES, weightless
from deployments.checkpoints.geometry import check_geometry, with_geometry
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.engine.blocks import shape_only_inputs
from deployments.engine.constant_cache import ConstantSender
from deployments.engine.demand import UNKNOWN, Demand
from deployments.engine.denoiser_stand_in import Submit, denoiser_stand_ins
from deployments.engine.engine import Engine
from deployments.engine.load import load_rank, open_denoisers, open_parallel
from deployments.engine.merge import build_mergers, patch_size, takes_any_length
from deployments.engine.micro_batch import MicroBatchDriver
from deployments.engine.passes import Begin, Passes
from deployments.engine.seat import Seat
from deployments.engine.step_cache import StepCache
from deployments.memory.device import resolve_dtype
from deployments.options.resume import OnPart
from deployments.request import GenerationRequest, InputPictures
from deployments.stages.adapters import AdapterReader, AdapterStore, using_adapters
from deployments.stages.call import Pictures, PipelineCalls
from deployments.stages.faults import Faults
from deployments.stages.finite import FiniteCheck
from deployments.stages.loop.between_steps import BetweenSteps, OnStep
from deployments.stages.loop.draws import Draws
from deployments.stages.loop.fingerprint import Fingerprint
from deployments.stages.loop.journal import Journal
from deployments.stages.loop.journal_file import read_journal, write_part
from deployments.stages.loop.partial import finished_partials
from deployments.stages.pipeline import load_pipeline
from deployments.stages.pixels.decodes import arguments_to_cpu
from deployments.stages.pixels.pictures import open_pictures
from deployments.stages.pixels.posterior import Encode, replay
from deployments.stages.stats import TransformerStats
from deployments.stages.tensors import to_device
from deployments.stages.trials.blank import BlankTexts
from deployments.stages.trials.memory_estimate import ForwardMemoryEstimator
from deployments.stages.trials.trial import Trial
from deployments.stages.trials.zeros import Zeros
from deployments.stages.warm_up import WarmUp
from deployments.stages.worker_rank import rank_stats

OnPartial = Callable[[int, DecodeArguments], None]
"""(partial_image_index, what the pipeline would decode if the request ended here)"""
OnForwards = Callable[[ForwardCounts], None]
"""Called once, when all forwards are done."""
OnResumed = Callable[[int], None]
"""(number of forwards taken from the journal), called before the first step."""


class Denoising:
    """The checkpoint's scheduler and rank 0's shards of its denoisers. Thread-safe once connected."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, listening: socket.socket | None = None
    ) -> None:
        """listening: where the ranks that share rank 0's forwards, and all other ranks, connect to it."""
        torch.set_num_threads(config.num_threads)
        self._store = None if listening is None else open_store(listening, config.num_ranks)
        model = with_geometry(model)
        self._family, self._config = model.architecture, config
        self._denoisers = open_denoisers(model, config)
        check_geometry(self._denoisers.folder, model)
        folder, index = self._denoisers.folder, self._denoisers.index
        pipe = load_pipeline(folder, index, weightless(index), config, variant=model.variant)
        for vae in filter(None, map(pipe.components.get, VAES)):
            vae.dtype = resolve_dtype(model.vae_dtype or config.dtype)
        # Tensors are moved at each use, not kept on the device for the whole request: many pipelines concatenate
        # them, and then no longer need them.
        to_stage = partial(to_device, device=self._denoisers.device, dtype=self._denoisers.dtype)
        self._calls = PipelineCalls(pipe, self._family.calls, to_stage, model.schedulers)
        self._zeros = Zeros(self._denoisers.skeletons)
        self._blank = BlankTexts(folder, index, self._denoisers.dtype)
        self._trial = Trial(self._calls, pipe, self._blank, model, self._denoisers)
        self._drawing = self._trial.start()
        """Schedulers that draw noise without a generator, by their names in requests."""
        self.pending_kinds = self._trial.takes_pending() if config.runs_passes_at_once else frozenset()
        """Kinds of call that can submit a forward before they use the result of the previous one."""
        self.finite = FiniteCheck()
        self._faults = Faults(self._calls, self._trial, self.finite, self._denoisers.dtype)
        self._group, parallel = open_parallel(self._denoisers, config, 0, self._store)
        self.loaded = load_rank(self._denoisers, model, config, 0, parallel)
        self.adapters: AdapterStore | None = None
        if model.takes_adapters:
            reader = AdapterReader(pipe, folder, index, self._denoisers.dtype)
            names, limit = list(self._denoisers.skeletons), int(config.adapter_cache_mib * 2**20)
            self.adapters = AdapterStore(reader, self.loaded.adapters, names, limit)
        parts = [name for name in index if name in self._denoisers.skeletons or "scheduler" in name]
        settings = (config.dtype, config.quantization, model.components, model.schedulers)
        self._fingerprint = Fingerprint(folder, parts, *settings)
        # A stream of its own: a request that waits for its copies does not wait for other requests' forwards.
        self._stream = accelerator.open_stream(self._denoisers.device, priority=-1)

    def open_rendezvous(self, host: str, places: Sequence[Place]) -> Rendezvous:
        """Opens the place where the other ranks meet. host: an address of this node that they can reach."""
        num_ranks, degree = len(places), self._config.parallel_degree
        if self._config.transport == "object_store":
            return Rendezvous(num_ranks, "object_store", mailboxes=open_mailboxes(num_ranks))
        if self._store is None:
            self._store = open_store(host, num_ranks)
        backend = plan_backend(places) if accelerator.has_nccl(self._denoisers.device) else "gloo"
        return Rendezvous(num_ranks, backend, host, self._store.port, degree=degree)

    def connect(self, rendezvous: Rendezvous | None, on_lost: Callable[[BaseException], None]) -> None:
        """Connects to the other ranks, if any, and starts the engine. on_lost: called when the group is lost."""
        device, skeletons = self._denoisers.device, self._denoisers.skeletons
        transport, parallel_transports = open_rings(rendezvous, device=device, store=self._store)
        mergers = build_mergers(skeletons, has_adapters=self.adapters is not None)
        shape_only = {name: shape_only_inputs(skeleton) for name, skeleton in skeletons.items()}
        admission = self.loaded.residency.admission
        is_limited = admission.is_limited
        self.engine = Engine(
            MicroBatchDriver(self.loaded, mergers, ConstantSender(), shape_only, self.loaded.residency.release),
            mergers,
            self._config,
            device=device,
            transport=transport,
            parallel_transports=parallel_transports,
            agree=no_peers if self._group is None else self._group.agree,
            patch_sizes={name: patch_size(skeleton) for name, skeleton in skeletons.items()},
            admission=admission if is_limited else None,
            estimate=ForwardMemoryEstimator(self._denoisers, self._config) if is_limited else None,
            adapter_bytes=lambda: self.loaded.adapters.num_bytes,
            on_lost=on_lost,
        )

    def warm_up(self, warm_up: WarmUp) -> None:
        """Runs blank requests through all ranks, for every size. To be called once connected."""
        longest = warm_up.max_sequence_length or self._family.max_sequence_length
        lengths = [longest]
        classes = {type(skeleton).__name__ for skeleton in self._denoisers.skeletons.values()}
        if longest is not None and any(map(takes_any_length, classes)):
            lengths.append(max(2, longest // 2))  # with two lengths, torch compiles for any length
        for request in map(self._trial.with_all_asked, warm_up.requests):
            for length in lengths:
                seat = self.join()
                try:
                    self.denoise(seat, None, request, max_sequence_length=length)
                finally:
                    self.leave(seat)

    def read_journal(self, url: str) -> tuple[JournalPart, ...]:
        """Returns the parts of a request's journal that files keep."""
        return read_journal(url)

    def write_part(self, url: str, part: JournalPart) -> None:
        write_part(url, part)

    def join(self, demand: Demand = UNKNOWN) -> Seat:
        """Returns a seat for one request; `leave` frees it."""
        return self.engine.queue.join(demand)

    def leave(self, seat: Seat) -> None:
        """Ends the request: if it still runs, its thread gets Cancelled at the next step."""
        self.engine.queue.leave(seat)

    @property
    def load(self) -> float:
        """Load of the step queue: 1 fills all micro-batches that may be in flight."""
        return self.engine.queue.stats().load

    def stats(self) -> TransformerStats:
        """Returns figures of the queue and rank 0; the other ranks report their own."""
        ring = self.engine.stats()
        rank_0 = rank_stats(0, self._denoisers, self.loaded, ring)
        adapters = () if self.adapters is None else tuple(self.adapters.names)
        return TransformerStats(self.engine.queue.stats(), (rank_0,), adapters, ring.occupied_s or 0.0)

    def close(self) -> None:
        """Ends the engine in an orderly way."""
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
        on_resumed: OnResumed = lambda _num_forwards: None,
        journal: Sequence[JournalPart] = (),
        on_part: OnPart | None = None,
    ) -> DecodeArguments:
        """Returns what the pipeline's VAE is to decode, on the CPU. Blocks.

        The method is long because it connects all parts of a request: journal, step cache, stand-ins, input images
        and partial images.

        Args:
            encodings: the encode stage's result; None: blank encodings, as long as max_sequence_length allows, and
                blank input images if the call takes any.
            posteriors: the decode stage's result for `pictures`.
            journal: the parts that another replica gave to its `on_part` for this request, before it died.

        Raises Cancelled, WrongField, NonFinite, OutOfDeviceMemory, or what the engine raises.
        """
        with (
            self.loaded.residency.translating_oom(),
            accelerator.on_stream(self._stream),
            using_adapters(self.adapters, request.adapters) as adapters,
        ):
            begin = partial(self.engine.begin, seat, adapters=adapters)
            kept = self._journal(begin, self._fingerprint.of(request, pictures), journal, on_part)
            on_resumed(kept.num_resumed)
            cache = StepCache(request.step_cache, kept.begin, partial(self.engine.queue.retain, seat))
            components = self._stand_ins(self._submit(cache, request))
            opened: Pictures = open_pictures(pictures, request.size)
            encode: Encode | None = None
            if encodings is None:
                components |= self._blank.on(self._denoisers.device)
                opened = self._calls.of(request).blank_pictures(request)
            elif opened:
                encode = self._replay(posteriors)

            finish = partial(self._finish, request, encodings, posteriors, opened)
            partials = finished_partials(num_partial_images, on_partial, finish)
            draws = Draws(request.seed, self._denoisers.device) if request.scheduler in self._drawing else None
            with self._faults.naming_the_field(request, opened, pictures):
                arguments = self._calls.of(request).denoise(
                    request,
                    components,
                    encodings,
                    encode=encode,
                    pictures=opened,
                    draws=draws,
                    after_step=BetweenSteps(request, cache, kept, on_step, partials),
                    max_sequence_length=max_sequence_length,
                )
            on_forwards(cache.counts)
            self._faults.check_finite(arguments, request)
            return arguments_to_cpu(arguments)

    def _journal(
        self, begin: Begin, fingerprint: str, parts: Sequence[JournalPart], on_part: OnPart | None
    ) -> Journal:
        device, config = self._denoisers.device, self._config.resume
        return Journal(begin, self._zeros, device, config, fingerprint, parts, on_part)

    def _finish(
        self,
        request: GenerationRequest,
        encodings: Encodings | None,
        posteriors: Posteriors,
        pictures: Pictures,
        latents: torch.Tensor,
    ) -> DecodeArguments:
        """Returns what a request would decode if it ended with these latents."""
        assert encodings is not None
        arguments = self._calls.of(request).finish(
            request,
            self._stand_ins(self._zeros),
            encodings,
            latents,
            encode=self._replay(posteriors),
            pictures=pictures,
        )
        return arguments_to_cpu(arguments)

    def _replay(self, posteriors: Posteriors) -> Encode:
        """Returns a `vae.encode` that replays posteriors; the pipeline itself casts what it samples from them."""
        return replay(posteriors, self._denoisers.device)

    def _submit(self, cache: StepCache, request: GenerationRequest) -> Submit:
        """Returns the function that computes the request's forwards."""
        if request.kind in self.pending_kinds:
            return Passes(cache.begin)
        return lambda component, inputs: cache.begin(0, component, inputs)()

    def _stand_ins(self, submit: Submit) -> dict[str, Any]:
        """Returns stand-ins for the pipeline's denoisers, by component name."""
        of = self._denoisers
        return dict(denoiser_stand_ins(of.skeletons, dtype=of.dtype, device=of.device, submit=submit))
