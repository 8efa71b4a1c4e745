"""Text to embeddings."""

from collections.abc import Sequence
from functools import partial

import torch

from deployments.checkpoints.components import fetch_stage, left_out, stage_components
from deployments.config import EncoderConfig, ModelConfig
from deployments.device import resolve_device, resolve_dtype
from deployments.families.family import Embeds
from deployments.memory.keeper import Keeper
from deployments.memory.on_demand import turn_to_load
from deployments.memory.share import take_share
from deployments.memory.spread import spread_models
from deployments.refusal import CannotServe, describe_cause
from deployments.request import Prompt
from deployments.stages.finite import FiniteCheck, dtype_advice
from deployments.stages.pipeline import Elsewhere, load_pipeline, loaded_models
from deployments.warm_up import WarmUp, default_prompt

NUM_TRIAL_TOKENS = 8
"""Of the prompt that is encoded at start."""


class TextEncoding:
    """The checkpoint's text encoders and tokenizers. Not thread-safe: tokenizers keep their padding state."""

    def __init__(self, model: ModelConfig, config: EncoderConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._family, self._config = model.architecture, config
        self.finite = FiniteCheck()
        self._max_sequence_length = config.max_sequence_length or self._family.max_sequence_length
        folder, index = fetch_stage(model, "encode")
        keep = stage_components(index, self._family, "encode")
        device = resolve_device(config)
        share = take_share(config, device)
        with turn_to_load(config, device), share.naming():
            self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant)
            models = loaded_models(self._pipe)
            if config.device_map is not None:
                spread_models(models, config)
            self.keeper = Keeper(models, config, device, config.device_map, share=share)
        if config.compile is None and not config.moves_weights:  # else it would cost what a request costs
            self._try(default_prompt(model), sorted(left_out(index)))

    def _try(self, prompt: Prompt, missing: Sequence[str]) -> None:
        """Raises CannotServe where no prompt could be encoded for the denoiser."""
        limit = self._max_sequence_length
        try:
            embeds = self._encode(prompt, limit and min(limit, NUM_TRIAL_TOKENS))
        except Exception as error:  # pipelines and tokenizers raise what they like
            parts = [name for name in missing if name.startswith(("text_encoder", "tokenizer"))]
            without = f"; the checkpoint leaves out {', '.join(parts)}" if parts else ""
            raise CannotServe(
                f"the encode stage cannot run {type(self._pipe).__name__}: {describe_cause(error)}{without}"
            ) from error
        denoiser = getattr(self._pipe, self._family.denoiser)
        if not isinstance(denoiser, Elsewhere):
            return
        for name, shape in self._family.embed_shapes(denoiser.config, NUM_TRIAL_TOKENS).items():
            made = embeds[name]
            if made is not None and made.shape[-1] != shape[-1]:
                raise CannotServe(
                    f"the encode stage makes {name} of width {made.shape[-1]}, and the {self._family.denoiser} "
                    f"takes {shape[-1]}: its config.json is of another model, or a text encoder is missing"
                )

    def warm_up(self, warm_up: WarmUp) -> None:
        """Texts of one length, or of any: sizes of pictures do not matter here."""
        for prompt in dict.fromkeys(request.prompt for request in warm_up.requests):
            self.encode(prompt)

    def encode(self, prompt: Prompt) -> Embeds:
        """CPU tensors, named as the pipeline's call spells them. Raises NotFinite."""
        embeds = self._encode(prompt, self._max_sequence_length)
        for name, value in embeds.items():
            if value is not None:
                self.finite.check(value, partial(self._explain, name))
        return embeds

    @torch.no_grad()
    def _encode(self, prompt: Prompt, max_sequence_length: int | None) -> Embeds:
        try:
            with self.keeper.at_work():
                embeds = self._family.encode(self._pipe, prompt, max_sequence_length)
                return {
                    name: value if value is None else value.cpu().contiguous() for name, value in embeds.items()
                }
        finally:
            self.keeper.release()

    def _explain(self, name: str) -> str:
        advice = dtype_advice("encoder.dtype", resolve_dtype(self._config.dtype))
        return f"{name} of {type(self._pipe).__name__} are NaN or infinite: {advice}"
