"""The pipeline's call with zeros for every forward: what fails here fails whatever the model would answer."""

from dataclasses import replace

import torch

from deployments.config import ModelConfig
from deployments.engine.load import Denoiser
from deployments.engine.merge import Inputs, latents_of
from deployments.refusal import CannotServe, describe_cause
from deployments.request import GenerationRequest, MediaSize
from deployments.stages.call import PipelineCall
from deployments.stages.draws import Draws
from deployments.warm_up import default_request

NUM_TOKENS = 8
"""Of blank texts."""
CPU = torch.device("cpu")


class Trial:
    """Of one checkpoint's pipeline and scheduler. Takes milliseconds: nothing is computed."""

    def __init__(self, call: PipelineCall, model: ModelConfig, denoiser: Denoiser) -> None:
        self._call, self._model, self._denoiser = call, model, denoiser
        side = model.geometry.size_multiple
        self._usual = default_request(model, MediaSize(side, side))

    def start(self) -> bool:
        """A request by the defaults, of the smallest size. Returns whether the scheduler draws noise by itself.

        Raises CannotServe.
        """
        draws = Draws(self._usual.seed, CPU)
        try:
            latents = self._run(self._usual, draws)
        except Exception as error:  # schedulers and pipelines raise what they like
            raise CannotServe(
                f"the denoise stage cannot run {self._call}: {describe_cause(error)}. {self._advice()}"
            ) from error
        expected = self._model.architecture.latents_shape(self._model.geometry, self._usual.size)
        if tuple(latents.shape) != expected:
            raise CannotServe(
                f"the denoise stage cannot run {self._call}: for {self._usual.size} it makes latents of shape "
                f"{list(latents.shape)}, and the vae takes {list(expected)}, by its config and as family "
                f"{self._model.family} has it: {self._denoiser.name} and vae are not of one model"
            )
        return draws.were_taken

    def find_fault(self, request: GenerationRequest) -> str | None:
        """The field for which this request would fail whatever the model answers, if there is one."""
        if not self._fails(request):
            return None
        usual = self._usual
        fields = {
            "num_inference_steps": replace(request, num_inference_steps=usual.num_inference_steps),
            "num_frames": replace(request, num_frames=usual.num_frames),
            "size": replace(request, width=usual.width, height=usual.height),
            self._model.architecture.guidance: replace(
                request,
                guidance_scale=usual.guidance_scale,
                true_cfg_scale=usual.true_cfg_scale,
                prompt=usual.prompt,
            ),
        }
        return next((field for field, changed in fields.items() if not self._fails(changed)), None)

    def is_finite(self, request: GenerationRequest) -> bool:
        """Whether the scheduler makes numbers of zeros."""
        return bool(self._run(request).isfinite().all())

    def _fails(self, request: GenerationRequest) -> bool:
        try:
            self._run(request)
        except Exception:  # as in `start`
            return True
        return False

    @torch.no_grad()
    def _run(self, request: GenerationRequest, draws: Draws | None = None) -> torch.Tensor:
        embeds = self._call.blank_embeds(NUM_TOKENS, NUM_TOKENS if request.prompt.is_guided else None)
        draws = draws or Draws(request.seed, CPU)
        return self._call.run(embeds, request, _answer_zeros, CPU, draws=draws)

    def _advice(self) -> str:
        family, name = self._model.architecture, self._denoiser.index["_class_name"]
        if name != family.pipeline_class:
            return (
                f"`family: {family.name}` is for checkpoints that run like {family.pipeline_class}, from a prompt "
                f"alone; {name} does not"
            )
        return (
            "Save the checkpoint with a scheduler that this pipeline can drive (`pipe.scheduler`), or complete it"
        )


def _answer_zeros(inputs: Inputs) -> tuple[torch.Tensor]:
    return (torch.zeros_like(latents_of(inputs)),)
