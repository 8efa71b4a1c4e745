"""Runs the pipeline's call with zeros for every forward: what fails here fails whatever the model predicts."""

import copy
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deployments.answers import DecodeArguments
from deployments.config.model import ModelConfig
from deployments.engine.blocks import cuttable_names
from deployments.engine.denoiser_stand_in import Submit, denoiser_stand_ins
from deployments.engine.load import Denoisers
from deployments.engine.merge import Inputs
from deployments.engine.passes import Passes
from deployments.errors import CannotServe, describe_cause
from deployments.memory.working import META
from deployments.request import CallKind, GenerationRequest
from deployments.stages.call import NO_PICTURES, Pictures, PipelineCall, PipelineCalls
from deployments.stages.loop.draws import Draws
from deployments.stages.stub import Reached, reach
from deployments.stages.tensors import each_tensor, without_values
from deployments.stages.trials.blank import BlankTexts
from deployments.stages.trials.zeros import Zeros, decoded_size
from deployments.stages.warm_up import default_request, tried_size

log = logging.getLogger("ray.serve")

FEW_STEPS = 4
"""Steps of distilled models, whose schedulers may not support as many steps as a family's default."""
NOT_ON_META = re.compile(
    r"\bmeta tensors?\b|\b(device|device_type|device type) '?meta\b|two devices, .*\bmeta\b|unsupported scalarType"
)
"""torch's error messages for operations that the meta device does not support."""
CPU = torch.device("cpu")


class Trial:
    """Trials of one checkpoint's pipeline and schedulers. One takes milliseconds, because nothing is computed."""

    def __init__(
        self, calls: PipelineCalls, pipe: Any, blank: BlankTexts, model: ModelConfig, denoisers: Denoisers
    ) -> None:
        """pipe: the checkpoint's own pipeline, whose VAE is a stub."""
        self._calls, self._pipe, self._blank, self._model, self._denoisers = calls, pipe, blank, model, denoisers
        self._zeros = Zeros(denoisers.skeletons)
        self._usual = default_request(model, tried_size(model.geometry))
        self._names = [each.asked_as for each in model.schedulers]

    def start(self) -> frozenset[str | None]:
        """Runs a request of a small size, with defaults for all else, with every scheduler.

        Returns those that draw noise without a generator; None is the checkpoint's own. Raises CannotServe.
        """
        draws, checked = Draws(self._usual.seed, CPU), set[str]()
        try:
            arguments = self._run(self._usual, draws, submit=self._check_first(checked))
        except Exception as error:  # schedulers and pipelines may raise anything
            raise CannotServe(
                f"the denoise stage cannot run {self._usual_call}: {describe_cause(error)}. {self._advice()}"
            ) from error
        self._check_decodable(arguments)
        self._try_others()
        if idle := self._denoisers.skeletons.keys() - checked:
            log.warning(
                "%s does not call its %s in a request with the defaults: does model_index.json lack a "
                "setting, such as boundary_ratio?",
                self._usual_call,
                " and ".join(sorted(idle)),
            )
        drawing = {name for name in self._names if self._draws_with(name)}
        return frozenset(drawing | {None} if draws.were_taken else drawing)

    def _draws_with(self, scheduler: str) -> bool:
        """Returns whether this scheduler draws noise without a generator. Raises CannotServe."""
        request = replace(self._usual, scheduler=scheduler)
        draws = Draws(request.seed, CPU)
        try:
            made = self._run(request, draws)
        except Exception as error:  # as in `start`
            raise CannotServe(
                f"model.schedulers, {scheduler}: {type(self._pipe).__name__} cannot run with it: "
                f"{describe_cause(error)}. Leave it out"
            ) from error
        if not all(bool(tensor.isfinite().all()) for tensor in each_tensor(made.values)):
            raise CannotServe(
                f"model.schedulers, {scheduler}: the latents are NaN or infinite after "
                f"{request.num_inference_steps} steps, whatever the model predicts: leave it out"
            )
        return draws.were_taken

    def _check_first(self, checked: set[str]) -> Submit:
        """Returns a Submit that gives zeros, but first checks that each model takes its first forward's inputs.

        checked: gets the names of the models that were called.
        """

        def submit(component: str, inputs: Inputs) -> Any:
            if component not in checked:
                checked.add(component)
                self._check_taken(component, inputs)
            return self._zeros(component, inputs)

        return submit

    def _check_taken(self, component: str, inputs: Inputs) -> None:
        """Raises ValueError if the model does not take these inputs. Runs only what comes before the blocks,
        because each block takes long on the meta device."""
        model: Any = copy.deepcopy(self._denoisers.skeletons[component]).to(META)
        blocks = cuttable_names(model)
        try:
            if (width := model.config.get("cross_attention_dim")) and component == "unet":
                _check_width(inputs["encoder_hidden_states"], width)
            if blocks:
                model.get_submodule(blocks[0]).register_forward_pre_hook(reach, with_kwargs=True)
                with suppress(Reached):
                    model(**without_values(dict(inputs)), return_dict=False)
        except NotImplementedError:
            return  # it reads values
        except RuntimeError as error:
            if NOT_ON_META.search(str(error)):
                return
            raise ValueError(
                f"its {component} does not take what its text encoders and scheduler give it ({error}): "
                "a component belongs to another model"
            ) from error

    def _check_decodable(self, arguments: DecodeArguments) -> None:
        """Raises CannotServe if the VAE would make another size of these latents, or does not take them."""
        asked = self._usual.size
        shapes = [list(tensor.shape) for tensor in each_tensor(arguments.args)]
        try:
            made = decoded_size(self._pipe.vae, arguments)
        except Exception as error:  # VAEs may raise anything
            raise CannotServe(
                f"the denoise stage cannot run {self._usual_call}: its vae does not take latents of shape "
                f"{shapes[0]}, which it makes for {asked}: {describe_cause(error)}; they belong to different "
                "models"
            ) from error
        if (made.width, made.height) != (asked.width, asked.height):
            denoisers = " and ".join(self._denoisers.skeletons)
            raise CannotServe(
                f"the denoise stage cannot run {self._usual_call}: for {asked} it makes latents of shape "
                f"{shapes[0]}, but the vae makes {made.width}x{made.height} from them: {denoisers} and vae belong "
                "to different models"
            )

    @property
    def _usual_call(self) -> PipelineCall:
        return self._calls.of(self._usual)

    def _try_others(self) -> None:
        """Tries the other kinds of call, and logs those that fail: a checkpoint is served without them."""
        for call in list(self._model.architecture.calls.values())[1:]:
            try:
                self._run(default_request(self._model, self._usual.size, call=call))
            except Exception as error:  # as in `start`
                log.warning("%s cannot %s: %s", call.pipeline_class, call.kind, describe_cause(error))

    def takes_pending(self) -> frozenset[CallKind]:
        """Returns the kinds of call that work with predictions which are waited for when they are first used."""

        def begin(_place: int, component: str, inputs: Inputs) -> Callable[[], Any]:
            return partial(self._zeros, component, inputs)

        taking = set[CallKind]()
        for call in self._calls:
            passes = Passes(begin)
            request = default_request(self._model, self._usual.size, call=call.asked)
            if not self._fails(request, submit=passes) and not passes.num_unread:
                taking.add(call.asked.kind)
        return frozenset(taking)

    def find_fault(self, request: GenerationRequest, pictures: Pictures = NO_PICTURES) -> str | None:
        """Returns the field that makes this request fail whatever the model predicts, if there is one."""
        if not self._fails(request, pictures):
            return None
        usual = self._usual
        fields = {
            "num_inference_steps": replace(request, num_inference_steps=usual.num_inference_steps),
            "strength": replace(request, strength=request.strength and 1.0),
            "scheduler": replace(request, scheduler=None),
            "guidance_scale_2": replace(request, guidance_scale_2=None),
            "num_frames": replace(request, num_frames=usual.num_frames),
            "size": replace(request, width=usual.width, height=usual.height),
            self._model.architecture.calls[request.kind].guidance: replace(
                request,
                guidance_scale=usual.guidance_scale,
                true_cfg_scale=usual.true_cfg_scale,
                prompt=usual.prompt,
            ),
        }
        if pictures and not self._fails(request):
            return "image"
        return next((field for field, changed in fields.items() if not self._fails(changed, pictures)), None)

    def with_all_asked(self, request: GenerationRequest) -> GenerationRequest:
        """Returns the request with enough steps, but at most the default, for every denoiser to be called."""
        steps, most = request.num_inference_steps, self._usual.num_inference_steps
        while len(self._denoisers.skeletons) > 1 and steps < most and not self._asks_all(request):
            steps = min(2 * steps, most)
            request = replace(request, num_inference_steps=steps)
        return request

    def _asks_all(self, request: GenerationRequest) -> bool:
        asked: set[str] = set()

        def submit(component: str, inputs: Inputs) -> Any:
            asked.add(component)
            return self._zeros(component, inputs)

        self._run(request, submit=submit)
        return asked == self._denoisers.skeletons.keys()

    def is_finite(self, request: GenerationRequest) -> bool:
        """Returns whether the result is finite if the model predicts zeros."""
        arguments = self._run(request)
        return all(bool(tensor.isfinite().all()) for tensor in each_tensor(arguments.values))

    def _fails(
        self,
        request: GenerationRequest,
        pictures: Pictures = NO_PICTURES,
        submit: Submit | None = None,
    ) -> bool:
        try:
            self._run(request, submit=submit, pictures=pictures)
        except Exception:  # as in `start`
            return True
        return False

    @torch.no_grad()
    def _run(
        self,
        request: GenerationRequest,
        draws: Draws | None = None,
        submit: Submit | None = None,
        pictures: Pictures = NO_PICTURES,
    ) -> DecodeArguments:
        """Runs a request's call. pictures: if empty, blank input images if the call takes any."""
        of = self._denoisers
        denoisers = denoiser_stand_ins(of.skeletons, dtype=of.dtype, device=CPU, submit=submit or self._zeros)
        return self._calls.of(request).denoise(
            request,
            {**denoisers, **self._blank.on(CPU)},
            pictures=pictures or self._calls.of(request).blank_pictures(request),
            draws=draws or Draws(request.seed, CPU),
            max_sequence_length=self._model.architecture.max_sequence_length,
        )

    def _advice(self) -> str:
        fewer = replace(self._usual, num_inference_steps=FEW_STEPS)
        if not self._fails(fewer, submit=self._check_first(set())):
            return (
                f"Set model.defaults.num_inference_steps, which is {self._usual.num_inference_steps}: with "
                f"{FEW_STEPS} it runs"
            )
        family, name = self._model.architecture, self._denoisers.index["_class_name"]
        if name != family.pipeline_class:
            return (
                f"`family: {family.name}` is for checkpoints that run like {family.pipeline_class}, from a prompt "
                f"alone; {name} does not"
            )
        return (
            "Save the checkpoint with a scheduler that this pipeline can drive (`pipe.scheduler`), or complete it"
        )


def _check_width(texts: torch.Tensor, width: int) -> None:
    if texts.shape[-1] != width:
        raise RuntimeError(f"encoder_hidden_states of width {texts.shape[-1]}, not {width}")
