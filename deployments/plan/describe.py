"""Computes bytes from a checkpoint's configs and the stages' settings.

Every model is built once, on the meta device.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedModel

from deployments.checkpoints.components import Stage, stage_components
from deployments.checkpoints.geometry import with_geometry
from deployments.checkpoints.json_file import read_json
from deployments.checkpoints.modular import open_modular
from deployments.checkpoints.packages import import_class
from deployments.checkpoints.parts import GGUF, find_parts
from deployments.checkpoints.source import fetch_configs
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.stage import SpreadConfig, StageConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.engine.blocks import BlockBytes, block_bytes, build_skeleton, cuttable_names
from deployments.engine.cut import Cut, CutReached
from deployments.engine.load import Denoisers, check_parallel, cut_blocks, open_denoisers
from deployments.engine.parallel import sliced, working_share
from deployments.memory.device import resolve_dtype
from deployments.memory.resident import device_bytes
from deployments.memory.stored import as_stored, dequantized_bytes, stored_bytes, stored_models
from deployments.memory.tiling import set_tiles
from deployments.memory.working import META, on_meta, to_meta, working_bytes
from deployments.plan.inputs import first_inputs, merged_inputs
from deployments.plan.sizes import BlockSizes, ComponentSizes, DenoiserSizes, ModelSizes, RankSizes, StageSizes
from deployments.request import MediaSize
from deployments.stages.trials.memory_estimate import decode_inputs, estimate_working

BUFFERED_BOUNDARIES = 2
"""Boundary tensors that a rank of a ring holds besides its forward's own: one being received, one being sent."""
UNSAID_TOKENS = 512
"""Text tokens assumed if only the tokenizer limits them and the encoder takes any number (Latte's T5)."""

_VAE = {"slicing", "tiling"}
_WEIGHTS = _VAE | {"dtype", "quantization", "layerwise_casting", "max_batch_size", "max_batch_tokens"}


@dataclass(frozen=True)
class Working:
    """Working memory of one forward of a whole denoiser; no shard needs more."""

    peak_bytes: int
    boundary_bytes: int
    """Bytes of the tensors that cross a cut."""
    batch_size: int
    """Number of forwards merged into this one."""


class Description:
    """One checkpoint. Computes what its stages need under any settings, from its configs, without weights."""

    def __init__(self, model: ModelConfig, configs_dir: Path | None = None) -> None:
        """configs_dir: a folder in diffusers' layout to read instead of the checkpoint; weights may be missing."""
        folder = open_modular(configs_dir) if configs_dir else fetch_configs(model.layout, revision=model.revision)
        self._index = read_json(folder / "model_index.json")
        # Weights converted from files will be as large as in a folder; GGUF files stay as they are.
        parts = {} if configs_dir else find_parts(model, self._index)
        gguf_files = {name: str(file) for name, file in parts.items() if file.suffix == GGUF}
        here = {"checkpoint": str(folder), "config": None, "components": gguf_files, "variant": None}
        self._model = with_geometry(model.model_copy(update=here))
        self._family = model.architecture
        self._folder = folder
        self._encoder = cache(self._describe_encoder)
        self._denoisers = cache(self._describe_denoisers)
        self._working = cache(self._run_denoisers)
        self._vae = cache(self._describe_vae)
        self._skeletons = cache(self._build_skeletons)

    def sizes(
        self,
        encoder: EncoderConfig,
        transformer: TransformerConfig,
        vae: VaeConfig,
        sizes: tuple[MediaSize, ...],
    ) -> ModelSizes:
        """Returns the sizes under these settings. Raises ValueError if a model cannot be cut or placed so."""
        num_text_tokens = encoder.max_sequence_length or self._family.max_sequence_length or 0
        stored, working = self._denoisers(_key(transformer), sizes, num_text_tokens)
        check_parallel(stored, transformer)
        blocks = {name: _block_bytes(model) for name, model in stored.items()}
        return ModelSizes(
            encode=self._with_adapters(encoder, _stage(encoder, *self._encoder(_key(encoder), num_text_tokens))),
            denoise=self._with_adapters(
                transformer, StageSizes(_components(stored), _ranks(transformer, stored, working))
            ),
            decode=_stage(vae, *self._vae(_key(vae), sizes)),
            denoisers=tuple(
                DenoiserSizes(
                    name, tuple(map(BlockSizes, cuttable_names(stored[name]), of.blocks)), of.head, of.tail
                )
                for name, of in blocks.items()
            ),
            batch_size=working.batch_size,
            sizes=sizes,
        )

    def _with_adapters(self, config: SpreadConfig, sizes: StageSizes) -> StageSizes:
        """Adds the adapters that each rank may keep, if the model takes any and they suit the stage's models."""
        pipeline_class = getattr(diffusers, self._index["_class_name"], None)
        known = getattr(pipeline_class, "_lora_loadable_modules", ())
        is_given = self._model.takes_adapters and any(part.name in known for part in sizes.components)
        return sizes.with_adapters(int(config.adapter_cache_mib * 2**20) if is_given else 0)

    def _describe_encoder(self, key: str, num_text_tokens: int) -> tuple[dict[str, nn.Module], int]:
        """Returns the encoders as stored, and their peak of working memory.

        Encoders run one after another, each on one prompt.
        """
        config = EncoderConfig.model_validate_json(key)
        stored, peaks = {}, []
        for name, skeleton in self._skeletons("encode").items():
            stored[name] = as_stored(skeleton, config, is_quantized=config.quantizes(name))
            if not isinstance(skeleton, PreTrainedModel):  # connectors, which need less than the encoder
                continue
            model = as_stored(skeleton, config, is_quantized=False).to(META)
            given = _encoder_input(model, num_text_tokens)
            peak = working_bytes(model, partial(model, given, output_hidden_states=True))
            peaks.append(peak + dequantized_bytes(model, config))
        return stored, max(peaks)

    def _describe_denoisers(
        self, key: str, sizes: tuple[MediaSize, ...], num_text_tokens: int
    ) -> tuple[Mapping[str, nn.Module], Working]:
        """Returns the denoisers as stored, and the working memory of the forward that needs the most."""
        config = TransformerConfig.model_validate_json(key)
        unquantized = _key(config.model_copy(update={"quantization": None}))
        denoisers, found = self._working(unquantized, sizes, num_text_tokens)
        peaks = [
            replace(working, peak_bytes=working.peak_bytes + dequantized_bytes(model, config))
            for model, working in found
        ]
        return stored_models(denoisers.skeletons, config), max(peaks, key=lambda working: working.peak_bytes)

    def _run_denoisers(
        self, key: str, sizes: tuple[MediaSize, ...], num_text_tokens: int
    ) -> tuple[Denoisers, list[tuple[nn.Module, Working]]]:
        """Returns each unquantised denoiser on the meta device with its working memory, for each size."""
        config = TransformerConfig.model_validate_json(key)
        denoisers = open_denoisers(self._model, config)
        models = {
            name: as_stored(skeleton, config, is_quantized=False).to(META)
            for name, skeleton in denoisers.skeletons.items()
        }
        found = []
        for size in sizes:
            inputs = first_inputs(denoisers, self._model, config, size, num_text_tokens=num_text_tokens)
            for name, own in inputs.items():
                model = models[name]
                merged, batch_size = merged_inputs(model, config, own)
                run = partial(model, **to_meta(merged), return_dict=False)
                peak_bytes = estimate_working(model, run)
                boundary_bytes = _boundary_bytes(cuttable_names(model), model, run) if peak_bytes else 0
                found.append((model, Working(peak_bytes, boundary_bytes, batch_size)))
        return denoisers, found

    def _describe_vae(self, key: str, sizes: tuple[MediaSize, ...]) -> tuple[dict[str, nn.Module], int]:
        config = VaeConfig.model_validate_json(key)
        skeletons: Mapping[str, Any] = self._skeletons("decode")
        skeleton = skeletons["vae"]
        config = config.model_copy(update={"dtype": self._family.vae_dtype(config.dtype, skeleton.config)})
        model: Any = as_stored(skeleton, config, is_quantized=False).to(META)
        if config.slicing:
            model.enable_slicing()
        if config.tiling is not None:
            set_tiles(model, config.tiling)
        dtype = resolve_dtype(config.dtype)
        calls = [
            partial(model.decode, decode_inputs(skeleton.config, self._model.geometry, size, dtype)[0])
            for size in sizes
        ]
        peak = max(working_bytes(model, call) for call in calls)
        return stored_models(skeletons, config), peak

    def _build_skeletons(self, stage: Stage) -> dict[str, nn.Module]:
        """Builds the stage's models on the meta device, by component name."""
        skeletons: dict[str, nn.Module] = {}
        for name in sorted(stage_components(self._index, self._family, stage)):
            model_class = import_class(self._index[name])
            if issubclass(model_class, ModelMixin):
                skeletons[name] = build_skeleton(model_class, self._folder, name)
            elif issubclass(model_class, PreTrainedModel):
                config = AutoConfig.from_pretrained(self._folder / name)
                with init_empty_weights(include_buffers=True):
                    model: Any = model_class(config)
                model.tie_weights()
                skeletons[name] = model
        return skeletons


def _ranks(
    config: TransformerConfig,
    stored: Mapping[str, nn.Module],
    working: Working,
) -> tuple[RankSizes, ...]:
    shares_time, degree = config.time_sharing is not None, config.parallel_degree
    held = {name: sliced(model, config.tensor_parallel) for name, model in stored.items()}
    blocks = {name: _block_bytes(model) for name, model in held.items()}
    peak = working_share(working.peak_bytes, config.context_parallel)
    if config.num_shards == 1:
        whole = tuple((0, len(of.blocks)) for of in blocks.values())
        weights, on_device = sum(map(stored_bytes, held.values())), device_bytes(held, config)
        return (RankSizes(weights, on_device, peak, whole, shares_time, degree),) * degree
    peak += BUFFERED_BOUNDARIES * working.boundary_bytes // config.context_parallel
    ranks = []
    for ranges in zip(*(cut_blocks(of, config) for of in blocks.values()), strict=True):
        on_device = weights = sum(of.of_shard(*own) for of, own in zip(blocks.values(), ranges, strict=True))
        if config.offload is not None or config.vram_limit_gib is not None:
            shards = {name: _cut(held[name], *own) for name, own in zip(held, ranges, strict=True)}
            on_device = device_bytes(shards, config)
        ranks += [RankSizes(weights, on_device, peak, ranges, shares_time, degree)] * degree
    return tuple(ranks)


def _cut(stored: nn.Module, start: int, end: int) -> nn.Module:
    shard = copy.deepcopy(stored)
    Cut(cuttable_names(stored), start, end).stub_foreign(shard)
    return shard


def _block_bytes(stored: nn.Module) -> BlockBytes:
    """Returns a model's bytes by block; a model that cannot be cut is all head."""
    return block_bytes(stored) if cuttable_names(stored) else BlockBytes(stored_bytes(stored), (), 0)


def _stage(config: StageConfig, stored: Mapping[str, nn.Module], peak_bytes: int) -> StageSizes:
    components = _components(stored)
    held = sum(component.weights_bytes for component in components)
    rank = RankSizes(held, device_bytes(stored, config), peak_bytes, shares_time=config.time_sharing is not None)
    return StageSizes(components, (rank,))


def _components(stored: Mapping[str, nn.Module]) -> tuple[ComponentSizes, ...]:
    return tuple(_component(name, model) for name, model in stored.items())


def _component(name: str, stored: nn.Module) -> ComponentSizes:
    num_parameters = sum(parameter.numel() for parameter in stored.parameters())
    return ComponentSizes(name, type(stored).__name__, num_parameters, stored_bytes(stored))


def _encoder_input(model: Any, num_text_tokens: int) -> torch.Tensor:
    """Returns the longest text that an encoder gets, or an image for an image encoder, on the meta device."""
    of = model.config
    if model.main_input_name == "pixel_values":
        sides = (of.image_size, of.image_size)
        return torch.empty(1, of.num_channels, *sides, dtype=model.dtype, device=META)
    longest = getattr(of, "max_position_embeddings", None) or num_text_tokens or UNSAID_TOKENS
    return torch.empty(1, min(num_text_tokens or longest, longest), dtype=torch.long, device=META)


def _key(config: StageConfig) -> str:
    """Returns the settings that weights and working memory depend on, as a key; the others only place them."""
    return config.model_dump_json(include=_WEIGHTS)


def _boundary_bytes(names: tuple[str, ...], model: nn.Module, run: Callable[[], Any]) -> int:
    """Returns the bytes of the tensors that cross a cut in the middle of a denoiser."""
    if len(names) < 2:
        return 0
    cut = Cut(names, 0, len(names) // 2)
    try:
        with on_meta(), cut.open(model, None):
            run()
    except CutReached as reached:
        return sum(tensor.nbytes for tensor in tree_leaves(reached.boundary))
    raise AssertionError("the forward ended before its cut")
