"""Three stages in three processes draw what plain diffusers draws, bit for bit."""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import ray
import torch
from diffusers import DiffusionPipeline

from cluster.ranks.place import Place
from cluster.replicas.serve_options import PRELOAD_FIELD
from deployments.answers import DecodeArguments
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.model import ModelConfig
from deployments.config.transformer import TransformerConfig
from deployments.config.vae import VaeConfig
from deployments.engine.blocks import block_bytes
from deployments.engine.load import open_denoisers
from deployments.engine.step_queue import Cancelled
from deployments.families import FAMILIES
from deployments.options.step_cache import StepCacheConfig
from deployments.replica.lifecycle import exit_replica
from deployments.request import GenerationRequest, Prompt
from deployments.stages import load_stage
from deployments.stages.preload import plan_preload
from tests.thorough import usually
from tests.tiny_models import EXPERTS, family_of, tiny_model

pytestmark = pytest.mark.slow


def _key(stage: str, family: str, config: Any) -> tuple[str, ...]:
    return stage, family, config.model_dump_json()


class StageProcess:
    """A process that holds stages of any family, each loaded at its first use."""

    def __init__(self) -> None:
        self._stages: dict[Any, Any] = {}

    def load(self, stage: str, family: str, config: Any, *args: Any) -> None:
        key = _key(stage, family, config)
        if key not in self._stages:
            self._stages[key] = load_stage(stage, tiny_model(family), config, *args)

    def call(self, stage: str, family: str, config: Any, method: str, *args: Any) -> Any:
        return getattr(self._stages[_key(stage, family, config)], method)(*args)

    def connect(self, stage: str, family: str, config: Any, rendezvous: Any) -> None:
        self._stages[_key(stage, family, config)].connect(rendezvous, exit_replica)

    def denoise(
        self, family: str, config: Any, embeds: Any, request: GenerationRequest, cancel_at: int | None = None
    ) -> DecodeArguments | None:
        """Returns what is to be decoded, or None if the request was cancelled after step cancel_at."""
        stage = self._stages[_key("denoise", family, config)]
        seat = stage.join()

        def on_step(step: int, _latents: torch.Tensor) -> None:
            if step == cancel_at:
                stage.leave(seat)

        try:
            arguments: DecodeArguments = stage.denoise(seat, embeds, request, on_step)
            return arguments
        except Cancelled:
            return None
        finally:
            stage.leave(seat)


class Processes:
    """An encoder, three ranks and a VAE, each in its own process."""

    def __init__(self, num_gpus: float = 0) -> None:
        """num_gpus: GPUs of each rank; the encoder and the VAE stay on the CPU."""
        environment = {
            "env_vars": {"OMP_NUM_THREADS": "1"},
            PRELOAD_FIELD: plan_preload(tiny_model("flux"), TransformerConfig()),
        }
        actor = ray.remote(num_cpus=0.1, runtime_env=environment)(StageProcess)
        self.encoder, self.vae = actor.remote(), actor.remote()  # one thread each: tokenizers are not thread-safe
        rank = actor.options(num_gpus=num_gpus, max_concurrency=48)
        self.ranks = [rank.remote() for _ in range(2 if num_gpus else 3)]
        self._num_gpus = num_gpus
        self._connected: list[tuple[str, TransformerConfig]] = []

    def draw(
        self, family: str, request: GenerationRequest, shards: int = 1, **settings: Any
    ) -> tuple[torch.Tensor, Any]:
        """Returns (latents, frames).

        settings: fields of the TransformerConfig.
        """
        tokens = 64 if family_of(family).max_sequence_length else None
        encode, decode = EncoderConfig(max_sequence_length=tokens), VaeConfig()
        denoise = self.connect(family, shards, **settings)
        ray.get(
            [self.encoder.load.remote("encode", family, encode), self.vae.load.remote("decode", family, decode)]
        )
        embeds = self.encoder.call.remote("encode", family, encode, "encode", request)
        arguments = ray.get(self.ranks[0].denoise.remote(family, denoise, embeds, request))
        frames = self.vae.call.remote("decode", family, decode, "decode", arguments, request)
        return arguments.latents, ray.get(frames)

    def connect(self, family: str, shards: int, **settings: Any) -> TransformerConfig:
        config, (driver, *workers) = self.config(shards, **settings), self.ranks[:shards]
        if (family, config) in self._connected:
            return config
        loads = [driver.load.remote("denoise", family, config)]
        loads += [rank.load.remote("worker", family, config, i + 1) for i, rank in enumerate(workers)]
        ray.get(loads)
        rendezvous = None
        if shards > 1:
            places = [Place("node", "0" if self._num_gpus else None)] * shards
            opened = driver.call.remote("denoise", family, config, "open_rendezvous", "127.0.0.1", places)
            rendezvous = ray.get(opened)
        joining = [rank.connect.remote("worker", family, config, rendezvous) for rank in workers]
        ray.get([driver.connect.remote("denoise", family, config, rendezvous), *joining])
        self._connected.append((family, config))
        return config

    def end(self) -> None:
        for process in (self.encoder, self.vae, *self.ranks):
            ray.kill(process)

    def config(self, shards: int, **settings: Any) -> TransformerConfig:
        return TransformerConfig(shards=shards, num_gpus=self._num_gpus, **settings)

    def stats(self, family: str, shards: int) -> list[Any]:
        """Returns the RankStats of each rank."""
        config, (driver, *workers) = self.config(shards), self.ranks[:shards]
        [rank_0] = ray.get(driver.call.remote("denoise", family, config, "stats")).ranks
        return [rank_0, *ray.get([rank.call.remote("worker", family, config, "stats") for rank in workers])]


@pytest.fixture(scope="module")
def processes(ray_cluster: None) -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.end()


def build_request(
    family: str, *, guided: bool, width: int = 64, height: int = 64, seed: int = 3
) -> GenerationRequest:
    of = family_of(family)
    scale = 3.0 if guided else 1.0
    guidance = of.call.defaults.guidance_scale if of.call.guidance == "true_cfg_scale" else scale
    return GenerationRequest(
        Prompt("a red cat", "blurry" if guided else None, guided),
        width,
        height,
        num_frames=5 if of.media == "video" else 1,
        num_inference_steps=3,
        guidance_scale=guidance,
        true_cfg_scale=scale if of.call.guidance == "true_cfg_scale" else None,
        seed=seed,
        output_format="mp4" if of.media == "video" else "png",
        output_compression=100,
        fps=16,
    )


def build_settings(family: str, request: GenerationRequest) -> dict[str, Any]:
    settings = {
        "negative_prompt": request.prompt.negative_text,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "true_cfg_scale": request.true_cfg_scale,
    }
    return {name: value for name, value in settings.items() if value is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_three_processes_draw_what_the_plain_pipeline_draws(
    processes: Processes, plain: Callable[..., Any], family: str
) -> None:
    """Tests requests without guidance; tests/deployments/stages/test_staged_pipelines.py tests guidance."""
    check_same_picture(processes, plain, family, build_request(family, guided=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_so_they_do_with_a_guidance_scale_and_no_negative_prompt(
    processes: Processes, plain: Callable[..., Any], family: str
) -> None:
    prompt = Prompt("a red cat", None, is_guided=not FAMILIES[family].call.needs_negative_prompt)
    request = replace(build_request(family, guided=True), prompt=prompt)
    check_same_picture(processes, plain, family, request)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_they_do_at_the_oddest_size_that_the_family_takes(
    processes: Processes, plain: Callable[..., Any], family: str
) -> None:
    """A UNet halves 5 x 3 latents, and must double them back to the same size."""
    multiple = FAMILIES[family].geometry(FAMILIES[family].published).size_multiple
    request = build_request(family, guided=True, width=5 * multiple, height=3 * multiple)
    check_same_picture(processes, plain, family, request)


def check_same_picture(
    processes: Processes, plain: Callable[..., Any], family: str, request: GenerationRequest
) -> None:
    """Compares latents and 8-bit frames."""
    latents, frames = processes.draw(family, request)
    settings = build_settings(family, request)
    assert torch.equal(latents, plain(family, "a red cat", seed=3, output_type="latent", **settings))
    expected = np.atleast_3d(plain(family, "a red cat", seed=3, output_type="np", **settings))
    expected = expected if expected.ndim == 4 else expected[None]
    np.testing.assert_array_equal(frames, (expected * 255).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("family", "shards", "transport"),
    [
        *usually(
            [(family, shards, "auto") for family in (*FAMILIES, EXPERTS) for shards in (2, 3)],
            lambda of: of[1] == (3 if of[0] in {"flux", "sdxl", "wan"} else 2),
        ),
        ("flux", 3, "object_store"),
    ],
)
def test_shards_in_separate_processes_draw_what_the_plain_pipeline_draws(
    processes: Processes, plain: Callable[..., Any], family: str, shards: int, transport: str
) -> None:
    request = build_request(family, guided=True)
    latents, _ = processes.draw(family, request, shards, transport=transport)
    expected = plain(family, "a red cat", seed=3, output_type="latent", **build_settings(family, request))
    assert torch.equal(latents, expected)


def test_forty_mixed_requests_are_neither_swapped_nor_lost(
    processes: Processes, plain: Callable[..., Any]
) -> None:
    """Sends all requests at once over two shards: families in turn; sizes, steps and seeds at random; some
    cancelled."""
    dice, config = random.Random(0), processes.config(2)
    requests, answers = [], []
    for i in range(40):
        family = list(FAMILIES)[i % len(FAMILIES)]
        width, height = dice.choice([(64, 64), (96, 64), (64, 96)])
        request = build_request(family, guided=dice.random() < 0.7, width=width, height=height, seed=i)
        request = replace(request, num_inference_steps=dice.randint(2, 6))
        cancel_at = 1 if dice.random() < 0.2 else None
        processes.connect(family, 2)
        encode = EncoderConfig(max_sequence_length=64 if FAMILIES[family].max_sequence_length else None)
        ray.get(processes.encoder.load.remote("encode", family, encode))
        requests.append((family, request, cancel_at, encode))
    for family, request, cancel_at, encode in requests:
        embeds = processes.encoder.call.remote("encode", family, encode, "encode", request)
        answers.append(processes.ranks[0].denoise.remote(family, config, embeds, request, cancel_at))
    assert sum(cancel_at is not None for *_, cancel_at, _ in requests) >= 5
    for (family, request, cancel_at, _), answer in zip(requests, ray.get(answers), strict=True):
        if cancel_at is not None:
            assert answer is None
            continue
        settings = build_settings(family, request)
        expected = plain(family, "a red cat", seed=request.seed, output_type="latent", **settings)
        # 2e-5 for the scheduler's latents, which are divided by the VAE's factor (0.13 or more) before decoding.
        torch.testing.assert_close(answer.latents, expected, atol=1.5e-4, rtol=2e-5)
    sizes = [
        ray.get(processes.ranks[0].call.remote("denoise", f, config, "stats")).queue.batch_sizes for f in FAMILIES
    ]
    assert any(size > 1 for batch_sizes in sizes for size in batch_sizes), "nothing merged"


TIERS = (
    None,
    StepCacheConfig(),
    StepCacheConfig(interval=4),
    StepCacheConfig(order=0, interval=3),
    StepCacheConfig(kind="easy_cache", threshold=0.3),
)
"""Step caches of the requests; None is lossless."""


def denoise_at_once(
    processes: Processes, family: str, shards: int, requests: Sequence[GenerationRequest]
) -> list[torch.Tensor]:
    """Returns latents, in the order of the requests."""
    config = processes.connect(family, shards)
    encode = EncoderConfig(max_sequence_length=64 if FAMILIES[family].max_sequence_length else None)
    ray.get(processes.encoder.load.remote("encode", family, encode))
    embeds = [processes.encoder.call.remote("encode", family, encode, "encode", request) for request in requests]
    answers = [
        processes.ranks[0].denoise.remote(family, config, given, request)
        for given, request in zip(embeds, requests, strict=True)
    ]
    return [answer.latents for answer in ray.get(answers)]


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_eight_requests_of_mixed_tiers_over_two_shards_are_each_as_alone(
    processes: Processes, family: str
) -> None:
    """Sizes and steps are equal, so that only the seats keep the requests' caches apart."""
    base = replace(build_request(family, guided=True), num_inference_steps=12)
    prompts = [Prompt(f"{animal} {i}", "blurry", is_guided=True) for i, animal in enumerate(["cat", "dog"] * 4)]
    requests = [
        replace(base, prompt=prompt, seed=i, step_cache=TIERS[i % len(TIERS)]) for i, prompt in enumerate(prompts)
    ]
    alone = [denoise_at_once(processes, family, 2, [request])[0] for request in requests]
    together = denoise_at_once(processes, family, 2, requests)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1.5e-4, rtol=2e-5)
    lossless = denoise_at_once(processes, family, 2, [replace(requests[1], step_cache=None)])[0]
    assert (alone[1] - lossless).abs().max() > 1e-3, "a cache that changes nothing proves nothing"


@pytest.mark.parametrize("family", usually(FAMILIES, {"flux", "sd15", "wan"}.__contains__))
def test_a_step_cache_is_the_same_over_any_shards_and_crosses_them_only_to_compute(
    processes: Processes, family: str
) -> None:
    request = replace(build_request(family, guided=False), num_inference_steps=12)
    cached = replace(request, step_cache=StepCacheConfig(interval=3))
    crossed = []
    for asked in (request, cached):
        processes.connect(family, 2)
        before = processes.stats(family, 2)
        denoise_at_once(processes, family, 2, [asked])
        after = processes.stats(family, 2)
        crossed.append([b.bytes_sent - a.bytes_sent for a, b in zip(before, after, strict=True)])
    num_steps = 13 if family == "sd15" else 12  # PNDM's first step has two forwards
    computed = 7 if family == "sd15" else 6
    for of_all, of_few in zip(*crossed, strict=True):
        # inputs that are equal in all steps cross once
        assert computed / num_steps - 0.02 < of_few / of_all < computed / num_steps + 0.1
    one, two = (denoise_at_once(processes, family, shards, [cached])[0] for shards in (1, 2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_together_hold_the_model_and_the_embedders_once_more_each(
    processes: Processes, family: str
) -> None:
    model = ModelConfig(name="tiny", checkpoint=f"tiny://{family}", family=family)
    [denoiser] = open_denoisers(model, processes.config(3)).skeletons.values()
    weights = block_bytes(denoiser)
    processes.connect(family, 3)
    held = [sum(rank.memory.weights_bytes.values()) for rank in processes.stats(family, 3)]
    assert sum(held) == 3 * weights.head + sum(weights.blocks) + weights.tail
    [blocks] = zip(*(rank.blocks.values() for rank in processes.stats(family, 3)), strict=True)
    assert [start for start, _ in blocks[1:]] == [end for _, end in blocks[:-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_another_seed_or_prompt_draws_another_picture(processes: Processes, family: str) -> None:
    """Without this test, equality could hold because no field of a request has an effect."""
    _, one = processes.draw(family, build_request(family, guided=True, seed=3))
    _, other = processes.draw(family, build_request(family, guided=True, seed=4))
    assert np.abs(one.astype(int) - other.astype(int)).max() > 8


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_defaults_are_those_of_the_pipelines_call(family: Any) -> None:
    call = inspect.signature(getattr(diffusers, family.pipeline_class).__call__).parameters
    for name in ("num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length"):
        if name in call:
            of = family if name == "max_sequence_length" else family.call.defaults
            assert getattr(of, name) == call[name].default, name


@pytest.fixture(scope="module")
def gpu_processes(ray_cluster: None) -> Iterator[Processes]:
    processes = Processes(num_gpus=0.5)
    yield processes
    processes.end()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_gpu_draws_what_the_plain_pipeline_draws_there(
    gpu_processes: Processes, family: str, shards: int
) -> None:
    """Two shards share the GPU, so they communicate by gloo through the CPU, not by NCCL."""
    request = build_request(family, guided=True)
    latents, _ = gpu_processes.draw(family, request, shards)
    pipe: Any = DiffusionPipeline.from_pretrained(fetch_checkpoint(f"tiny://{family}", ())).to("cuda")
    tokens = {} if FAMILIES[family].max_sequence_length is None else {"max_sequence_length": 64}
    frames = {"num_frames": 5} if FAMILIES[family].media == "video" else {}
    expected = pipe(
        "a red cat",
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
        return_dict=False,
        **build_settings(family, request),
        **tokens,
        **frames,
    )[0]
    # the text encoders ran on the CPU for these latents, and on the GPU for the expected ones
    torch.testing.assert_close(latents, expected.cpu(), atol=2e-3, rtol=2e-3)
