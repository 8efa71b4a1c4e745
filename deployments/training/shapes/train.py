"""`relay train-shapes`: resumable, with sample sheets on the way and a checkpoint at the end.

OUT_DIR/training.pt           the state of the training: written every minute, by rename
OUT_DIR/latents.safetensors   the scenes that the transformer is trained on
OUT_DIR/drawings.safetensors  the transformer's own drawings, that the decoder is trained on
OUT_DIR/sheets/               sample images below the true ones: reconstructions, then unseen prompts
OUT_DIR/shapes/               the checkpoint; renamed into place, so it is complete
OUT_DIR/shapes.png            some prompts, and the stored checkpoint's images for them
"""

import os
import tempfile
import time
from pathlib import Path

import torch
from diffusers import FluxPipeline
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deployments.training.shapes.autoencoder import AutoencoderTraining, State
from deployments.training.shapes.decoder import DecoderTraining
from deployments.training.shapes.flow import FlowTraining
from deployments.training.shapes.models import build_transformer
from deployments.training.shapes.plan import EMBEDDED_PLAN, Plan
from deployments.training.shapes.reading import ReadingTraining
from deployments.training.shapes.sheet import write_contact_sheet

Phase = AutoencoderTraining | ReadingTraining | FlowTraining | DecoderTraining
_STATE_FILE = "training.pt"


def train_shapes(out_dir: Path, plan: Plan = EMBEDDED_PLAN, console: Console | None = None) -> Path:
    """Trains the `shapes` checkpoint and returns its folder, `out_dir/shapes`; resumes an interrupted training.

    The same plan on the same machine with the same number of threads gives the same weights except for rounding,
    interrupted or not.

    Raises:
        FileExistsError: the checkpoint exists already, or `out_dir` holds a training of another plan.
    """
    checkpoint = out_dir / "shapes"
    if checkpoint.exists():
        raise FileExistsError(f"{checkpoint} is complete; remove it, or name another folder")
    (out_dir / "sheets").mkdir(parents=True, exist_ok=True)
    console = console or Console(stderr=True)
    torch.set_num_threads(plan.num_threads)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.seed)
        run = _Run(out_dir, plan, console)
        autoencoder = AutoencoderTraining(plan)
        run.train("autoencoder", autoencoder)
        reading = ReadingTraining(plan)
        run.train("reading", reading)
        read_and_seen = (autoencoder.vae, reading, out_dir / "latents.safetensors")
        transformer = build_transformer()
        for phase in plan.flow_phases:
            flow = FlowTraining(plan, phase, transformer, *read_and_seen)
            run.train(phase.name, flow)
            transformer = flow.average
        pipeline = flow.pipeline()
        decoder = DecoderTraining(plan, pipeline, out_dir / "drawings.safetensors")
        run.train("decoder", decoder)
    pipeline.vae = decoder.vae
    _write_checkpoint(pipeline, checkpoint)
    write_contact_sheet(checkpoint, out_dir / "shapes.png")
    return checkpoint


class _Run:
    """Runs phases step by step, and keeps the state of the whole training in one file."""

    def __init__(self, out_dir: Path, plan: Plan, console: Console) -> None:
        self._out_dir, self._plan, self._console = out_dir, plan, console
        file = out_dir / _STATE_FILE
        self._state: State = torch.load(file, weights_only=True) if file.exists() else {"plan": repr(plan)}
        if self._state["plan"] != repr(plan):
            raise FileExistsError(f"{file} belongs to another plan, {self._state['plan']}; name another folder")

    def train(self, name: str, phase: Phase) -> None:
        """Trains a phase from its saved step, or the first, to the last."""
        done, state = self._state.get(name, (0, None))
        if state is not None:
            phase.load_state_dict(state)
        if done == phase.num_steps:
            return
        sheet_every = max(1, phase.num_steps // self._plan.num_sheets)
        saved_at = time.monotonic()
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
        with Progress(*columns, TimeRemainingColumn(), console=self._console) as progress:
            task = progress.add_task(name, total=phase.num_steps, completed=done, loss=float("nan"))
            mean = float("nan")
            for step in range(done, phase.num_steps):
                loss = phase.step(step)
                mean = loss if mean != mean else 0.98 * mean + 0.02 * loss
                progress.update(task, advance=1, loss=mean)
                if (step + 1) % sheet_every == 0:
                    self._report(name, step + 1, phase, mean)
                if time.monotonic() > saved_at + self._plan.save_every_s:
                    self._save(name, step + 1, phase)
                    saved_at = time.monotonic()
        self._save(name, phase.num_steps, phase)

    def _save(self, name: str, step: int, phase: Phase) -> None:
        self._state[name] = (step, phase.state_dict())
        partial = self._out_dir / f"{_STATE_FILE}.partial"
        torch.save(self._state, partial)
        partial.rename(self._out_dir / _STATE_FILE)

    def _report(self, name: str, step: int, phase: Phase, loss: float) -> None:
        report = phase.report(self._out_dir / "sheets" / f"{name}-{step:05d}.png")
        self._console.print(f"{name} {step}: loss {loss:.4f}, {report}")


def _write_checkpoint(pipeline: FluxPipeline, folder: Path) -> None:
    """Writes transformer and VAE in float16, to be small; text encoders in float32, because transformers loads in
    the stored dtype, whereas diffusers loads in float32."""
    for module in (pipeline.transformer, pipeline.vae):
        for parameter in module.parameters():  # not module.to(): diffusers would log advice about loading
            parameter.data = parameter.data.to(torch.float16)
    with tempfile.TemporaryDirectory(prefix=".shapes-", dir=folder.parent) as building:
        pipeline.save_pretrained(Path(building) / folder.name)
        os.rename(Path(building) / folder.name, folder)
