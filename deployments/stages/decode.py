"""Latents to pixels and sound; and pictures that go in to what their latents are drawn from."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from deployments.checkpoints.components import fetch_stage, stage_components
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.sharing import NotTheSame, check_same
from deployments.config import ModelConfig, VaeConfig
from deployments.device import resolve_device, resolve_dtype
from deployments.embedding_cache import EmbeddingCache
from deployments.memory.keeper import Keeper
from deployments.memory.on_demand import turn_to_load
from deployments.memory.share import take_share
from deployments.memory.tiling import is_tiled, set_tiles
from deployments.refusal import CannotServe, describe_cause
from deployments.request import (
    DecodeArguments,
    Encodings,
    GenerationRequest,
    InputPictures,
    MediaSize,
    Posterior,
    Posteriors,
    Tile,
    num_bytes,
)
from deployments.stages.call import PipelineCalls
from deployments.stages.call_key import call_key
from deployments.stages.finite import FiniteCheck, dtype_advice
from deployments.stages.foresee import DecodeForesight, decode_inputs
from deployments.stages.media import MEDIA_TYPES, Frames, Sound, encode_media
from deployments.stages.pictures import open_pictures
from deployments.stages.pipeline import load_pipeline, loaded_models
from deployments.stages.posterior import given, kept
from deployments.stages.tensors import laid, to_device
from deployments.stages.tiles import SPREAD_CLASSES, AskPeer, SpreadDecode, decode_tile
from deployments.warm_up import WarmUp, tried_size

log = logging.getLogger("ray.serve")


class Decoding:
    """The checkpoint's VAE, and what makes a video's sound."""

    def __init__(
        self, model: ModelConfig, config: VaeConfig, holder: "tuple[ModelConfig, Decoding] | None" = None
    ) -> None:
        """holder: another checkpoint that has the same VAE, and has loaded it. Raises NotTheSame."""
        torch.set_num_threads(config.num_threads)
        model = with_geometry(model)
        self._family, self._geometry = model.architecture, model.geometry
        self.finite = FiniteCheck()
        self.cache: EmbeddingCache = (
            EmbeddingCache(int(config.cache_mib * 2**20)) if holder is None else holder[1].cache
        )
        self.num_encoded = 0
        """Pictures that went in and were not in the cache."""
        folder, index = fetch_stage(model, "decode", config.dtype)
        keep = stage_components(index, self._family, "decode")
        self._device, self._sound_dtype = resolve_device(config), resolve_dtype(config.dtype)
        if holder is None:
            share = take_share(config, self._device)
            with turn_to_load(config, self._device), share.naming():
                self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant)
                said, config = config, self._with_dtype(config)
                if config.dtype != said.dtype:
                    self._pipe.vae.to(self._dtype)
                own = _set_up(self._pipe.vae, config)
                self.keeper = Keeper(loaded_models(self._pipe), config, self._device, own=own, share=share)
        else:
            check_same(holder[0], model, "decode", config.dtype)
            self.keeper, held = holder[1].keeper, loaded_models(holder[1]._pipe)
            self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant, held=held)
            config = self._with_dtype(config)
            if self._dtype != holder[1]._dtype:
                raise NotTheSame(
                    f"{model.name!r} needs its VAE in {self._dtype}, and that of {holder[0].name!r} is in "
                    f"{holder[1]._dtype}: set vae.dtype to float32"
                )
        self._calls = PipelineCalls(self._pipe, self._family.calls, schedulers=model.schedulers)
        self._ask_peer: AskPeer | None = None
        self._num_tiles_away = 0
        self._foresee: DecodeForesight | None = None
        if self.keeper.needs.is_limited:
            classes = {name: type(model) for name, model in loaded_models(self._pipe).items()}
            self._foresee = DecodeForesight(classes, folder, config, self._geometry)
        if config.compile is None and not config.moves_weights:  # else it would cost what a request costs
            self._try()

    def _with_dtype(self, config: VaeConfig) -> VaeConfig:
        """The same, in the dtype that the VAE needs."""
        dtype = self._family.vae_dtype(config.dtype, self._pipe.vae.config)
        self._dtype: torch.dtype = resolve_dtype(dtype)
        return config.model_copy(update={"dtype": dtype})

    def spread_tiles(self, ask_peer: AskPeer, num_away: int) -> None:
        """From now on, where the VAE's tiles know nothing of each other. num_away: in other replicas at once."""
        if type(self._pipe.vae).__name__ in SPREAD_CLASSES:
            self._ask_peer, self._num_tiles_away = ask_peer, num_away

    @torch.no_grad()
    def decode_tile(self, tile: Tile) -> tuple[torch.Tensor, ...]:
        """For another replica: what the VAE's decoder returns, on the CPU. Raises OutOfShare."""
        with self.keeper.at_work():
            return decode_tile(self._pipe.vae.decoder, tile, self._device)

    @torch.no_grad()
    def _try(self) -> None:
        """Blank latents of a small size. Raises CannotServe."""
        size = tried_size(self._geometry)
        try:
            with self.keeper.at_work():
                self._check_size(torch.cat([self._pixels(call) for call in self._blank(size).calls]).shape, size)
        except Exception as error:  # VAEs raise what they like
            raise CannotServe(
                f"the decode stage cannot run {type(self._pipe.vae).__name__}: {describe_cause(error)}"
            ) from error
        finally:
            self.keeper.release()

    def warm_up(self, warm_up: WarmUp) -> None:
        """Blank latents of every size, to files."""
        for request in warm_up.requests:
            self.decode_media(self._blank(request.size), request)

    def _blank(self, size: MediaSize) -> DecodeArguments:
        inputs = decode_inputs(self._pipe.vae.config, self._geometry, size, self._dtype)
        first, *more = (DecodeArguments.of(torch.zeros_like(empty, device="cpu")) for empty in inputs)
        return replace(first, more=tuple(more))

    def check(self, request: GenerationRequest) -> None:
        """Raises NeverFits. Thread-safe; takes up to seconds the first time for a size."""
        if self._foresee is not None:
            size = request.size
            self.keeper.needs.at_most(size, f"decoding {size}", partial(self._foresee, size))

    @torch.no_grad()
    def prepare(self, encodings: Encodings, request: GenerationRequest, pictures: InputPictures) -> Posteriors:
        """What the VAE makes of the pictures that go in, on the CPU. Raises NotFinite, WrongField, OutOfShare."""
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
            with self.keeper.at_work():
                call.prepare(request, encodings, opened, encode)
        except Exception as error:
            if error in failed:
                raise
            # It fails in the denoise stage too, which knows what to say of it.
            log.debug("%s fails beside its VAE: %s", call, error)
        finally:
            self.keeper.release()
        return tuple(made)

    def _encode(self, pixels: torch.Tensor, args: Any, kwargs: Any) -> Posterior:
        """`vae.encode` of pictures, unless they were seen lately."""
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
        """The call's own `vae.decode` -> uint8 [F, H, W, 3], F = 1 for a picture. Raises NeverFits."""
        self.check(request)
        try:
            with self.keeper.at_work(), self.keeper.needs.measured(request.size):
                return self._decode(arguments, request)
        except BaseException:
            self._forget_frames()
            raise
        finally:
            self.keeper.release()

    def _forget_frames(self) -> None:
        """Of a video's VAE that failed half way: what it keeps between frames would lie there till the next."""
        if hasattr(self._pipe.vae, "clear_cache"):
            self._pipe.vae.clear_cache()

    def _decode(self, arguments: DecodeArguments, request: GenerationRequest) -> Frames:
        """What lay on the device for it is free again; frames leave it one by one, for float pixels are large."""
        pixels = map(self._pixels, arguments.calls)
        frames = np.concatenate([self._to_uint8(frame) for some in pixels for frame in torch.split(some, 1)])
        self._check_size((len(frames), 3, *frames.shape[1:3]), request.size)
        return frames

    def _pixels(self, call: DecodeArguments) -> torch.Tensor:
        """[F, C, H, W], on the device."""
        args, kwargs = to_device((call.args, dict(call.kwargs)), self._device, self._dtype)
        args = (laid(args[0], call.is_channels_last), *args[1:])
        pixels = self._decoded(args, kwargs)
        if self._geometry.frames_per_decode is not None:
            return pixels.float()  # as each pipeline does that puts a video together of frames
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
        """The call's own `audio_vae.decode`, and the vocoder after it. Raises NotFinite, OutOfShare."""
        vae, vocoder = self._pipe.audio_vae, self._pipe.vocoder
        try:
            with self.keeper.at_work():
                args, kwargs = to_device((call.args, dict(call.kwargs)), self._device, self._sound_dtype)
                made = vocoder(vae.decode(*args, **kwargs, return_dict=False)[0])
                samples = made if isinstance(made, torch.Tensor) else made[0]
                self.finite.check(samples, self._explain_sound)
                rate = vocoder.config.get("output_sampling_rate") or vae.config.sample_rate
                return Sound(samples[0].float().cpu().numpy(), rate)
        finally:
            self.keeper.release()

    def _check_size(self, shape: Sequence[int], size: MediaSize) -> None:
        """The last word on sizes: a VAE whose config says another factor than it has. shape: [F, C, H, W]"""
        num_frames, _, height, width = shape
        made = MediaSize(width, height, num_frames if self._family.media == "video" else size.num_frames)
        if made != size:
            raise ValueError(
                f"{type(self._pipe.vae).__name__} made {made} of latents for {size}: its config.json describes "
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
        return f"what {type(self._pipe.vae).__name__} made of the picture is NaN or infinite: {advice}"

    def _to_uint8(self, frame: torch.Tensor) -> Frames:
        """By the pipeline's own processor, [1, C, H, W] -> [1, H, W, C]. Raises NotFinite."""
        self.finite.check(frame, self._explain)
        processor = getattr(self._pipe, "video_processor", None) or self._pipe.image_processor
        rounded: Frames = (processor.postprocess(frame, output_type="np") * 255).round().astype(np.uint8)
        return rounded

    def decode_media(self, arguments: DecodeArguments, request: GenerationRequest) -> tuple[bytes, str]:
        """The request's file and its media type: encoded where it is decoded."""
        data = encode_media(
            self.decode(arguments, request),
            request.output_format,
            sound=None if arguments.sound is None else self.decode_sound(arguments.sound),
            compression=request.output_compression,
            fps=request.fps,
        )
        return data, MEDIA_TYPES[request.output_format]


def _set_up(vae: Any, config: VaeConfig) -> list[str]:
    """What diffusers' VAEs have of their own against large pictures; the names of it."""
    own = []
    if config.slicing:
        vae.enable_slicing()
        own.append("slicing")
    if config.tiling is not None:
        set_tiles(vae, config.tiling)
        own.append(f"tiling: {config.tiling.tile_size or 'as the VAE has it'}")
    return own
