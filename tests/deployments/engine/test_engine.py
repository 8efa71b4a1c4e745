"""The engine as a whole, in one process: a real shard, and what happens when its last request has left."""

import threading
from typing import Any

import pytest
import torch

from deployments.config import EncoderConfig, ModelConfig, TransformerConfig
from deployments.engine.engine import Engine
from deployments.engine.load import load_rank, open_denoiser
from deployments.engine.merge import Merger
from deployments.engine.outline import Outliner
from deployments.engine.work import Leader
from deployments.families import FAMILIES
from deployments.request import Prompt
from deployments.stages import load_stage

MODEL = ModelConfig(name="tiny", checkpoint="tiny://flux")


@pytest.fixture
def inputs() -> dict[str, Any]:
    encoding = load_stage("encode", MODEL, "flux", EncoderConfig(max_sequence_length=16))
    embeds = encoding.encode(Prompt("a red cat", None, is_guided=False))
    return {
        "hidden_states": torch.randn(1, 16, 64),
        "encoder_hidden_states": embeds["prompt_embeds"],
        "pooled_projections": embeds["pooled_prompt_embeds"],
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(16, 3),
    }


@pytest.mark.parametrize(("settings", "makes_room"), [({"offload": "model"}, True), ({}, False)])
def test_room_is_made_when_the_last_request_has_left(
    inputs: dict[str, Any], settings: dict[str, Any], makes_room: bool
) -> None:
    config = TransformerConfig(**settings)
    denoiser = open_denoiser(MODEL, FAMILIES["flux"], config)
    merger, idle = Merger(denoiser.model_class.__name__), threading.Semaphore(0)
    shard = load_rank(denoiser, MODEL, config, rank=0).shard
    leader = Leader(shard, merger, Outliner(frozenset()), on_idle=idle.release)
    engine = Engine(leader, merger, config, device=denoiser.device, on_lost=pytest.fail)
    try:
        predictions = []
        for _ in range(2):
            predictions.append(burst(engine, inputs))
            assert idle.acquire(timeout=5 if makes_room else 0.05) == makes_room
        assert torch.equal(*predictions)
        assert not idle.acquire(timeout=0.05), "once for each burst"
    finally:
        engine.close()


def burst(engine: Engine, inputs: dict[str, Any]) -> torch.Tensor:
    """Two requests, one after the other has begun."""
    seats = [engine.queue.join(), engine.queue.join()]
    answers = [engine.forward(seat, inputs) for seat in seats]
    for seat in seats:
        engine.queue.leave(seat)
    assert torch.equal(*answers)
    return answers[0]
