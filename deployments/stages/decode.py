"""The decode stage: decodes latents into pixels and sound, and encodes input images into posteriors."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from deployments.answers import DecodeArguments, Encodings, Posterior, Posteriors, Tile, num_bytes
from deployments.checkpoints.components import fetch_stage, stage_components
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.sharing import NotTheSame, check_same
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.errors import CannotServe, describe_cause
from deployments.media.pixels import MEDIA_TYPES, Frames, Sound, encode_media
from deployments.media.thumbnail import make_thumbnail
from deployments.memory.device import resolve_device, resolve_dtype
from deployments.memory.residency import WeightResidency
from deployments.memory.share import take_share
from deployments.memory.tiling import is_tiled, set_tiles
from deployments.memory.time_sharing import lease_to_load
from deployments.request import GenerationRequest, InputPictures, MediaSize
from deployments.stages.call import PipelineCalls
from deployments.stages.call_key import call_key
from deployments.stages.finite import FiniteCheck, dtype_advice
from deployments.stages.pipeline import load_pipeline, loaded_models
from deployments.stages.pixels.pictures import open_pictures
from deployments.stages.pixels.posterior import given, kept
from deployments.stages.pixels.tiles import SPREAD_CLASSES, AskPeer, SpreadDecode, decode_tile
from deployments.stages.result_cache import ResultCache
from deployments.stages.tensors import laid, to_device
from deployments.stages.trials.memory_estimate import DecodeMemoryEstimator, decode_inputs
from deployments.stages.warm_up import WarmUp, tried_size

log = logging.getLogger("ray.serve")


class Decoding:
    """The checkpoint's VAE, and the models that make a video's sound."""

    def __init__(
        self, model: ModelConfig, config: VaeConfig, owner: "tuple[ModelConfig, Decoding] | None" = None
    ) -> None:
        """owner: another checkpoint that has loaded the same VAE. Raises NotTheSame if they differ."""
        torch.set_num_threads(config.num_threads)
        model = with_geometry(model)
        self._family, self._geometry = model.architecture, model.geometry
        self.finite = FiniteCheck()
        self.cache: ResultCache = ResultCache(int(config.cache_mib * 2**20)) if owner is None else owner[1].cache
        self.num_encoded = 0
        """Input images that were not in the cache."""
        folder, index = fetch_stage(model, "decode", config.dtype)
        keep = stage_components(index, self._family, "decode")
        self._device, self._sound_dtype = resolve_device(config), resolve_dtype(config.dtype)
        if owner is None:
            share = take_share(config, self._device)
            with lease_to_load(config, self._device), share.translating_oom():
                self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant)
                said, config = config, self._with_dtype(config)
                if config.dtype != said.dtype:
                    self._pipe.vae.to(self._dtype)
                own = _set_up(self._pipe.vae, config)
                self.residency = WeightResidency(
                    loaded_models(self._pipe), config, self._device, own=own, share=share
                )
        else:
            check_same(owner[0], model, "decode", config.dtype)
            self.residency, held = owner[1].residency, loaded_models(owner[1]._pipe)
            self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant, held=held)
            config = self._with_dtype(config)
            if self._dtype != owner[1]._dtype:
                raise NotTheSame(
                    f"{model.name!r} needs its VAE in {self._dtype}, and that of {owner[0].name!r} is in "
                    f"{owner[1]._dtype}: set vae.dtype to float32"
                )
        self._calls = PipelineCalls(self._pipe, self._family.calls, schedulers=model.schedulers)
        self._ask_peer: AskPeer | None = None
        self._num_tiles_away = 0
        self._estimator: DecodeMemoryEstimator | None = None
        if self.residency.admission.is_limited:
            classes = {name: type(model) for name, model in loaded_models(self._pipe).items()}
            self._estimator = DecodeMemoryEstimator(classes, folder, config, self._geometry)
        if config.compile is None and not config.moves_weights:  # or it would cost as much as a request
            self._try()

    def _with_dtype(self, config: VaeConfig) -> VaeConfig:
        """Returns the config with the dtype that the VAE needs."""
        dtype = self._family.vae_dtype(config.dtype, self._pipe.vae.config)
        self._dtype: torch.dtype = resolve_dtype(dtype)
        return config.model_copy(update={"dtype": dtype})

    def spread_tiles(self, ask_peer: AskPeer, num_away: int) -> None:
        """Makes decodes spread tiles over replicas, if the VAE's are independent. num_away: most tiles at once."""
        if type(self._pipe.vae).__name__ in SPREAD_CLASSES:
            self._ask_peer, self._num_tiles_away = ask_peer, num_away

    @staticmethod
    def thumbnail(video: bytes) -> bytes:
        """Returns a still of the video, as WebP."""
        return make_thumbnail(video)

    @torch.no_grad()
    def decode_tile(self, tile: Tile) -> tuple[torch.Tensor, ...]:
        """Decodes a tile for another replica; returns tensors on the CPU. Raises OutOfDeviceMemory."""
        with self.residency.on_device():
            return decode_tile(self._pipe.vae.decoder, tile, self._device)

    @torch.no_grad()
    def _try(self) -> None:
        """Decodes blank latents of a small size. Raises CannotServe if that fails."""
        size = tried_size(self._geometry)
        try:
            with self.residency.on_device():
                self._check_size(torch.cat([self._pixels(call) for call in self._blank(size).calls]).shape, size)
        except Exception as error:  # VAEs may raise anything
            raise CannotServe(
                f"the decode stage cannot run {type(self._pipe.vae).__name__}: {describe_cause(error)}"
            ) from error
        finally:
            self.residency.release()

    def warm_up(self, warm_up: WarmUp) -> None:
        """Decodes blank latents of every size into files."""
        for request in warm_up.requests:
            self.decode_media(self._blank(request.size), request)

    def _blank(self, size: MediaSize) -> DecodeArguments:
        inputs = decode_inputs(self._pipe.vae.config, self._geometry, size, self._dtype)
        first, *more = (DecodeArguments.of(torch.zeros_like(empty, device="cpu")) for empty in inputs)
        return replace(first, more=tuple(more))

    def check(self, request: GenerationRequest) -> None:
        """Raises ExceedsMemory if the request can never be decoded here. Thread-safe; may take seconds for a new
        size."""
        if self._estimator is not None:
            size = request.size
            self.residency.admission.max_admissible(size, f"decoding {size}", partial(self._estimator, size))

    @torch.no_grad()
    def prepare(self, encodings: Encodings, request: GenerationRequest, pictures: InputPictures) -> Posteriors:
        """Returns the posteriors of the input images, on the CPU.

        Raises NonFinite, WrongField, OutOfDeviceMemory.
        """
        opened = open_pictures(pictures, request.size, reads_video=True)
        made: list[Posterior] = []
        failed: list[Exception] = []

        def encode(pixels: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            try:
                posterior = self._encode(pixels, args, kwargs)
            except Exception as error:
                failed.append(error)
                raise
            made.append(posterior)
            return given(posterior, pixels.device, return_dict=return_dict)

        call = self._calls.of(request)
        try:
            with self.residency.on_device():
                call.prepare(request, encodings, opened, encode)
        except Exception as error:
            if error in failed:
                raise
            # The error occurs in the denoise stage too, which can explain it.
            log.debug("%s fails outside of its VAE: %s", call, error)
        finally:
            self.residency.release()
        return tuple(made)

    def _encode(self, pixels: torch.Tensor, args: Any, kwargs: Any) -> Posterior:
        """Calls `vae.encode` for images, unless the cache has the result."""
        key = call_key("encode", (pixels, *args), kwargs)
        made: Posterior | None = self.cache.get(key)
        if made is None:
            self.num_encoded += 1
            args, kwargs = to_device((args, kwargs), self._device, self._dtype)
            made = kept(self._pipe.vae.encode(pixels.to(self._device, self._dtype), *args, **kwargs))
            self.finite.check(made[1], self._explain_encoded)
            self.cache.put(key, made, num_bytes(made))
        return made

    @torch.no_grad()
    def decode(self, arguments: DecodeArguments, request: GenerationRequest) -> Frames:
        """Runs the call's own `vae.decode` -> uint8 [F, H, W, 3], F = 1 for an image. Raises ExceedsMemory."""
        self.check(request)
        try:
            with self.residency.on_device(), self.residency.admission.measured(request.size):
                return self._decode(arguments, request)
        except BaseException:
            self._forget_frames()
            raise
        finally:
            self.residency.release()

    def _forget_frames(self) -> None:
        """Frees what a video VAE keeps between frames, after a decode that has failed."""
        if hasattr(self._pipe.vae, "clear_cache"):
            self._pipe.vae.clear_cache()

    def _decode(self, arguments: DecodeArguments, request: GenerationRequest) -> Frames:
        """Decodes into frames on the CPU; the tensors on the device are freed on return.

        Frames are copied from the device one by one, because float pixels are large.
        """
        pixels = map(self._pixels, arguments.calls)
        frames = np.concatenate([self._to_uint8(frame) for some in pixels for frame in torch.split(some, 1)])
        self._check_size((len(frames), 3, *frames.shape[1:3]), request.size)
        return frames

    def _pixels(self, call: DecodeArguments) -> torch.Tensor:
        """Decodes one call; returns [F, C, H, W], on the device."""
        args, kwargs = to_device((call.args, dict(call.kwargs)), self._device, self._dtype)
        args = (laid(args[0], call.is_channels_last), *args[1:])
        pixels = self._decoded(args, kwargs)
        if self._geometry.frames_per_decode is not None:
            return pixels.float()  # like each pipeline that assembles a video from decoded frames
        return pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels

    def _decoded(self, args: Any, kwargs: Any) -> torch.Tensor:
        vae = self._pipe.vae
        if self._ask_peer is not None and is_tiled(vae, args[0]):
            with SpreadDecode(vae, self._ask_peer, self._num_tiles_away) as spread:
                return spread.decode(*args, **kwargs)
        pixels: torch.Tensor = vae.decode(*args, **kwargs, return_dict=False)[0]
        return pixels

    @torch.no_grad()
    def decode_sound(self, call: DecodeArguments) -> Sound:
        """Runs the call's own `audio_vae.decode`, then the vocoder. Raises NonFinite, OutOfDeviceMemory."""
        vae, vocoder = self._pipe.audio_vae, self._pipe.vocoder
        try:
            with self.residency.on_device():
                args, kwargs = to_device((call.args, dict(call.kwargs)), self._device, self._sound_dtype)
                made = vocoder(vae.decode(*args, **kwargs, return_dict=False)[0])
                samples = made if isinstance(made, torch.Tensor) else made[0]
                self.finite.check(samples, self._explain_sound)
                rate = vocoder.config.get("output_sampling_rate") or vae.config.sample_rate
                return Sound(samples[0].float().cpu().numpy(), rate)
        finally:
            self.residency.release()

    def _check_size(self, shape: Sequence[int], size: MediaSize) -> None:
        """Raises ValueError for a wrong size: the VAE's config may give another factor than the VAE has.

        shape: [F, C, H, W] of the decoded pixels.
        """
        num_frames, _, height, width = shape
        made = MediaSize(width, height, num_frames if self._family.media == "video" else size.num_frames)
        if made != size:
            raise ValueError(
                f"{type(self._pipe.vae).__name__} made {made} from latents for {size}: its config.json describes "
                "another VAE"
            )

    def _explain(self) -> str:
        advice = dtype_advice("vae.dtype", self._dtype)
        return f"the pixels that {type(self._pipe.vae).__name__} decoded are NaN or infinite: {advice}"

    def _explain_sound(self) -> str:
        advice = dtype_advice("vae.dtype", self._sound_dtype)
        return f"the sound that {type(self._pipe.vocoder).__name__} made is NaN or infinite: {advice}"

    def _explain_encoded(self) -> str:
        advice = dtype_advice("vae.dtype", self._dtype)
        return f"what {type(self._pipe.vae).__name__} made from the image is NaN or infinite: {advice}"

    def _to_uint8(self, frame: torch.Tensor) -> Frames:
        """Converts with the pipeline's own processor, [1, C, H, W] -> [1, H, W, C]. Raises NonFinite."""
        self.finite.check(frame, self._explain)
        processor = getattr(self._pipe, "video_processor", None) or self._pipe.image_processor
        rounded: Frames = (processor.postprocess(frame, output_type="np") * 255).round().astype(np.uint8)
        return rounded

    def decode_media(self, arguments: DecodeArguments, request: GenerationRequest) -> tuple[bytes, str]:
        """Decodes into the request's file; returns the file and its media type."""
        data = encode_media(
            self.decode(arguments, request),
            request.output_format,
            sound=None if arguments.sound is None else self.decode_sound(arguments.sound),
            compression=request.output_compression,
            fps=request.fps,
        )
        return data, MEDIA_TYPES[request.output_format]


def _set_up(vae: Any, config: VaeConfig) -> list[str]:
    """Turns on what diffusers' VAEs offer to save memory; returns the names of these techniques."""
    own = []
    if config.slicing:
        vae.enable_slicing()
        own.append("slicing")
    if config.tiling is not None:
        set_tiles(vae, config.tiling)
        own.append(f"tiling: {config.tiling.tile_size or 'as the VAE has it'}")
    return own
