"""Trains both text encoders to predict the scene from its sentence, before the transformer is trained.

FLUX's own text encoders are pretrained, too. If these were only trained through the transformer, learning which
shape `left` refers to would take most of the hour. The prediction heads are discarded.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.training.shapes.autoencoder import State, learning_rate_factor
from deployments.training.shapes.plan import Plan
from deployments.training.shapes.scene import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, random_scene
from deployments.training.shapes.text import (
    MAX_SEQUENCE_LENGTH,
    TEXT_WIDTH,
    build_clip_encoder,
    build_clip_tokenizer,
    build_t5_encoder,
    build_t5_tokenizer,
)
from deployments.training.shapes.wording import describe, describe_unseen

_STREAM = 5
_WARMUP = 50
_LONGER_SHARE = 0.2
_LONGER = (64, 128)
_NUM_PROBES = 400
_QUESTIONS = (len(SHAPES) + 1, len(COLORS), len(SIZES))
"""Number of answers to each question on a place: its shape or none, the colour, the size."""
_NOT_ASKED = -100


class ReadingTraining:
    """The training phase of the text encoders."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.num_steps = plan.num_reading_steps
        self.clip_tokenizer, self.t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
        self.clip, self.t5 = build_clip_encoder(self.clip_tokenizer), build_t5_encoder(self.t5_tokenizer)
        num_answers = len(PLACES) * sum(_QUESTIONS) + len(BACKGROUNDS)
        heads = {"clip": nn.Linear(TEXT_WIDTH, num_answers), "t5": _TokenReader()}
        self._all = nn.ModuleDict({"text_encoder": self.clip, "text_encoder_2": self.t5, **heads}).train()
        self._optimizer = torch.optim.AdamW(
            self._all.parameters(), plan.reading_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )

    def step(self, step: int) -> float:
        """One optimiser step; returns the cross entropy per answer, of both encoders together."""
        rng = np.random.default_rng([self._plan.seed, _STREAM, step])
        text_length = int(rng.choice(_LONGER)) if rng.random() < _LONGER_SHARE else MAX_SEQUENCE_LENGTH
        batch = max(1, self._plan.reading_tokens_per_step // text_length)
        scenes = [random_scene(rng, is_held_out=False) for _ in range(batch)]
        prompts = [describe(scene, rng) for scene in scenes]
        answers = torch.tensor([_answers(scene) for scene in scenes])
        losses = [
            functional.cross_entropy(logits, wanted, ignore_index=_NOT_ASKED)
            for answered in self._read(prompts, text_length)
            for logits, wanted in zip(answered, answers.unbind(1), strict=True)
        ]
        loss = torch.stack([loss for loss in losses if not loss.isnan()]).mean()
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._all.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.reading_lr * learning_rate_factor(step, self.num_steps, _WARMUP)
        self._optimizer.step()
        return loss.item()

    @torch.no_grad()
    def report(self, file: Path) -> str:
        """Returns the share of unseen scenes in unseen wordings that each encoder reads without a mistake.

        Writes nothing to `file`.
        """
        rng = np.random.default_rng([self._plan.seed, _STREAM, 2**31])
        scenes = [random_scene(rng, is_held_out=True) for _ in range(_NUM_PROBES)]
        prompts = [describe_unseen(scene, rng) for scene in scenes]
        wanted = torch.tensor([_answers(scene) for scene in scenes])
        rights = []
        for answered in self._read(prompts, MAX_SEQUENCE_LENGTH):
            given = torch.stack([logits.argmax(-1) for logits in answered], dim=1)
            rights.append(((given == wanted) | (wanted == _NOT_ASKED)).all(dim=1).float().mean().item())
        return "unseen sentences read correctly: CLIP {:.1%}, T5 {:.1%}".format(*rights)

    def state_dict(self) -> State:
        return {"all": self._all.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self._all.load_state_dict(state["all"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _read(self, prompts: list[str], text_length: int) -> list[list[Tensor]]:
        """Returns, per encoder, the logits [B, answers] of every question."""
        clip_ids = self.clip_tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").input_ids
        t5_ids = self.t5_tokenizer(
            prompts, padding="max_length", max_length=text_length, truncation=True, return_tensors="pt"
        ).input_ids
        states = {"clip": self.clip(clip_ids).pooler_output, "t5": self.t5(t5_ids).last_hidden_state}
        sizes = [*_QUESTIONS * len(PLACES), len(BACKGROUNDS)]
        return [list(self._all[name](state).split(sizes, dim=-1)) for name, state in states.items()]


class _TokenReader(nn.Module):
    """Predicts each place, and the background, by one attention query over all tokens, as image tokens attend.

    This forces everything that a sentence says of one shape into one token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(PLACES) + 1, TEXT_WIDTH) * TEXT_WIDTH**-0.5)
        self.thing = nn.Linear(TEXT_WIDTH, sum(_QUESTIONS))
        self.background = nn.Linear(TEXT_WIDTH, len(BACKGROUNDS))

    def forward(self, states: Tensor) -> Tensor:
        """[B, S, D] -> [B, answers]."""
        heard = torch.softmax(states @ self.queries.T, dim=1).transpose(1, 2) @ states
        things = self.thing(heard[:, :-1]).flatten(1)
        return torch.cat([things, self.background(heard[:, -1])], dim=-1)


def _answers(scene: Scene) -> list[int]:
    """Returns class numbers by place in the order of `_QUESTIONS`, then that of the background."""
    answers = []
    for place in PLACES:
        thing = next((thing for thing in scene.things if thing.place == place), None)
        if thing is None:
            answers += [0, _NOT_ASKED, _NOT_ASKED]
        else:
            answers += [
                1 + SHAPES.index(thing.shape),
                list(COLORS).index(thing.color),
                list(SIZES).index(thing.size),
            ]
    return [*answers, list(BACKGROUNDS).index(scene.background)]
