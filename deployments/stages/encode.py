"""Text to embeddings."""

import torch

from deployments.checkpoints.components import fetch_stage, stage_components
from deployments.config import EncoderConfig, ModelConfig
from deployments.device import resolve_device
from deployments.families.family import Embeds
from deployments.memory.keeper import Keeper
from deployments.memory.on_demand import turn_to_load
from deployments.memory.share import take_share
from deployments.request import Prompt
from deployments.stages.pipeline import load_pipeline, loaded_models
from deployments.warm_up import WarmUp


class TextEncoding:
    """The checkpoint's text encoders and tokenizers. Not thread-safe: tokenizers keep their padding state."""

    def __init__(self, model: ModelConfig, config: EncoderConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self._family = model.architecture
        self._max_sequence_length = config.max_sequence_length or self._family.max_sequence_length
        folder, index = fetch_stage(model, "encode")
        keep = stage_components(index, self._family, "encode")
        device = resolve_device(config)
        share = take_share(config, device)
        with turn_to_load(config, device), share.naming():
            self._pipe = load_pipeline(folder, index, keep, config, variant=model.variant)
            self.keeper = Keeper(loaded_models(self._pipe), config, device, share=share)

    def warm_up(self, warm_up: WarmUp) -> None:
        """Texts of one length, or of any: sizes of pictures do not matter here."""
        for prompt in dict.fromkeys(request.prompt for request in warm_up.requests):
            self.encode(prompt)

    @torch.no_grad()
    def encode(self, prompt: Prompt) -> Embeds:
        """CPU tensors, named as the pipeline's call spells them."""
        try:
            with self.keeper.at_work():
                embeds = self._family.encode(self._pipe, prompt, self._max_sequence_length)
                return {
                    name: value if value is None else value.cpu().contiguous() for name, value in embeds.items()
                }
        finally:
            self.keeper.release()


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous()
