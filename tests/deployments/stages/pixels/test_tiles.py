"""Tiles of one decode in several replicas give the same pixels, whichever replica decodes them or is lost."""

import asyncio
import copy
import io
import json
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from deployments.answers import DecodeArguments, Tile
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.model import ModelConfig
from deployments.config.vae import VaeConfig
from deployments.memory.config import TilingConfig
from deployments.memory.kernels import set_channels_last
from deployments.memory.tiling import is_tiled, set_tiles
from deployments.request import GenerationRequest, MediaSize, Prompt
from deployments.stages.pixels import tiles
from deployments.stages.pixels.tiles import SPREAD_CLASSES, AskPeer, SpreadDecode, decode_tile
from deployments.stages.trials.memory_estimate import decode_inputs
from deployments.vae import Vae
from tests.deployments.variants import read_model

TINY = {
    "AutoencoderDC": "sana",
    "AutoencoderKL": "flux",
    "AutoencoderKLFlux2": "flux2",
    "AutoencoderKLHunyuanImage": "hunyuan-image",
    "AutoencoderKLHunyuanVideo": "hunyuan-video",
    "AutoencoderKLLTXVideo": "ltx-video",
    "AutoencoderKLQwenImage": "qwen-image",
    "AutoencoderKLWan": "wan",
}
"""A tiny checkpoint for each class of VAE."""
QUICK = frozenset({"AutoencoderKL", "AutoencoderKLHunyuanVideo", "AutoencoderKLWan"})
"""Classes tested without --thorough: one for images, and two for videos, without and with a cache of features."""
NUM_FRAMES = {"hunyuan-video": 21, "ltx-video": 9, "wan": 9}
"""Number of frames of videos; for the first, more than its VAE decodes at once."""
CPU = torch.device("cpu")
PATIENCE_S = 60.0


def load(tiny: str, *, is_channels_last: bool = False) -> tuple[Any, torch.Tensor]:
    """Returns the VAE, and latents that need several of its tiles."""
    folder = fetch_checkpoint(f"tiny://{tiny}", ())
    model = read_model(folder)
    name = json.loads((folder / "model_index.json").read_text())["vae"][1]
    vae = getattr(diffusers, name).from_pretrained(folder / "vae").eval()
    side = 64 * max(1, model.geometry.latent_pixels // 16)
    set_tiles(vae, TilingConfig(tile_size=side))
    if is_channels_last:
        set_channels_last("vae", vae)
    num_frames = NUM_FRAMES.get(tiny, 1)
    width, height = (5 * side // 2, 2 * side) if num_frames == 1 else (3 * side // 2, side)
    size = MediaSize(width, height, num_frames)
    [empty, *_] = decode_inputs(vae.config, model.geometry, size, torch.float32)
    latents = torch.randn(empty.shape, generator=torch.Generator().manual_seed(0))
    assert is_tiled(vae, latents)
    return vae, latents


class Peer:
    """Another replica, which gets copies and answers with copies."""

    def __init__(self, vae: Any) -> None:
        self._decoder = copy.deepcopy(vae.decoder)
        self._lock = threading.Lock()
        self.num_tiles = 0
        self.has_answered = threading.Event()

    @torch.no_grad()
    def ask(self, tile: Tile) -> Sequence[Any]:
        tile = pickle.loads(pickle.dumps(tile))
        with self._lock:
            outputs = decode_tile(self._decoder, tile, CPU)
        self.num_tiles += 1
        self.has_answered.set()
        return pickle.loads(pickle.dumps(outputs))

    def go_first(self, vae: Any) -> None:
        """Makes the VAE's own decoder wait until this one has answered."""
        wait_before_each_tile(vae, lambda: self.has_answered.wait(PATIENCE_S))


def wait_before_each_tile(vae: Any, wait: Callable[[], object]) -> None:
    """Calls `wait` before each tile in the VAE's own decoder."""

    def hook(*_: Any) -> None:
        wait()

    vae.decoder.register_forward_pre_hook(hook)


@torch.no_grad()
def spread(vae: Any, latents: torch.Tensor, ask: AskPeer) -> torch.Tensor:
    with SpreadDecode(vae, ask, 2) as decode:
        return decode.decode(latents)


@torch.no_grad()
def whole(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pixels: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels


def check(vae: Any, latents: torch.Tensor) -> None:
    expected, peer = whole(vae, latents), Peer(vae)
    peer.go_first(vae)
    assert torch.equal(spread(vae, latents, peer.ask), expected)
    assert peer.num_tiles


def test_every_class_that_spreads_is_tried() -> None:
    assert set(TINY) == SPREAD_CLASSES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        is_thorough = metafunc.config.getoption("--thorough")
        metafunc.parametrize("name", [name for name in TINY if is_thorough or name in QUICK])


def test_tiles_of_two_replicas_make_what_those_of_one_make(name: str) -> None:
    vae, latents = load(TINY[name])
    assert type(vae).__name__ == name
    check(vae, latents)


def test_so_do_those_whose_channels_lie_last() -> None:
    """The layout decides how convolutions round, and a slice of latents is contiguous in neither layout."""
    vae, latents = load("flux", is_channels_last=True)
    check(vae, latents.contiguous(memory_format=torch.channels_last))


def test_so_do_pieces_of_time_of_a_video_as_small_as_a_tile() -> None:
    vae, latents = load("hunyuan-video")
    latents = latents[..., :8, :8]
    assert is_tiled(vae, latents)
    check(vae, latents)


def test_what_no_other_replica_takes_is_decoded_here() -> None:
    vae, latents = load("flux")
    assert torch.equal(spread(vae, latents, lambda _: None), whole(vae, latents))


def test_a_replica_that_dies_half_way_loses_nothing() -> None:
    vae, latents = load("wan")
    expected, peer = whole(vae, latents), Peer(vae)
    peer.go_first(vae)

    def die_after_the_first(tile: Tile) -> Sequence[Any]:
        if peer.has_answered.is_set():
            raise RuntimeError("the actor died")
        return peer.ask(tile)

    assert torch.equal(spread(vae, latents, die_after_the_first), expected)
    assert peer.num_tiles


def test_a_replica_that_hangs_is_waited_for_no_longer_than_a_tile_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MIN_TIMEOUT_S", 0.05)
    vae, latents = load("flux")
    expected, is_over, asked = whole(vae, latents), threading.Event(), threading.Event()

    def hang(_: Tile) -> None:
        asked.set()
        is_over.wait(PATIENCE_S)

    wait_before_each_tile(vae, lambda: asked.wait(PATIENCE_S))
    assert torch.equal(spread(vae, latents, hang), expected)
    is_over.set()


def test_what_one_tile_holds_is_not_spread() -> None:
    vae, latents = load("flux")
    assert not is_tiled(vae, latents[:, :, :8, :8])
    assert is_tiled(vae, latents[:, :, :8, :9])


# The deployments.

MODEL = ModelConfig(name="tiny", checkpoint="tiny://flux", family="flux")
CONFIG = VaeConfig(tiling=64, max_replicas=2)
REQUEST = GenerationRequest(
    Prompt("a red fox", None, is_guided=False), 320, 256, 1, 3, None, None, 0, "png", 100, fps=8
)


def build_latents(seed: int) -> DecodeArguments:
    return DecodeArguments.of(torch.randn(1, 16, 32, 40, generator=torch.Generator().manual_seed(seed)))


def between(replicas: list[Vae], loop: asyncio.AbstractEventLoop) -> None:
    """Lets each replica ask the other to decode tiles, as over Serve."""

    def asking(other: Vae) -> Callable[[Tile], Any]:
        def ask(tile: Tile) -> Any:
            return asyncio.run_coroutine_threadsafe(other.decode_tile(tile, replicas[0]._version), loop).result()

        return ask

    for one, other in zip(replicas, reversed(replicas), strict=True):
        one._stage.spread_tiles(asking(other), 2)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_replicas_that_spread_at_once_wait_for_none() -> None:
    replicas, latents = [Vae(MODEL, CONFIG) for _ in range(2)], [build_latents(seed) for seed in range(6)]

    async def decode_all() -> list[bytes]:
        alone = [(await replicas[0].decode(each, REQUEST)).data for each in latents]
        between(replicas, asyncio.get_running_loop())
        at_once = [replicas[i % 2].decode(each, REQUEST) for i, each in enumerate(latents)]
        async with asyncio.timeout(PATIENCE_S):
            media = await asyncio.gather(*at_once)
        assert alone == [each.data for each in media]
        return alone

    assert len(set(asyncio.run(decode_all()))) == len(latents)


def test_an_idle_replica_decodes_tiles_of_the_others_pictures() -> None:
    replicas = [Vae(MODEL, CONFIG) for _ in range(2)]
    wait_before_each_tile(replicas[0]._stage._pipe.vae, lambda: time.sleep(0.02))

    async def decode() -> tuple[bytes, bytes]:
        alone = await replicas[0].decode(build_latents(0), REQUEST)
        between(replicas, asyncio.get_running_loop())
        return alone.data, (await replicas[0].decode(build_latents(0), REQUEST)).data

    alone, spread_out = asyncio.run(decode())
    assert np.array_equal(pixels(spread_out), pixels(alone))
    assert [asyncio.run(replica.stats()).num_tiles > 0 for replica in replicas] == [False, True]


def test_a_replica_of_another_version_takes_no_tile() -> None:
    tile = Tile((((torch.zeros(1, 16, 8, 8),), {}),), None, is_channels_last=False)

    async def ask() -> list[bool]:
        newer = Vae(MODEL, CONFIG)
        older = Vae(MODEL, CONFIG.model_copy(update={"dtype": "bfloat16"}))
        return [await newer.decode_tile(tile, of._version) is None for of in (newer, older)]

    assert asyncio.run(ask()) == [False, True]
