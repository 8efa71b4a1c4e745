"""Tests of LoRA adapters over HTTP, on two shards: each request gets what PEFT draws with its adapters."""

import base64
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image
from ray import serve

from deployments.checkpoints.adapter_file import USUAL_NAME
from deployments.checkpoints.source import fetch_checkpoint
from serve_app.app import build_app
from serve_app.config.serve_file import parse_app_config
from tests.conftest import TEXT_TOKENS
from tests.deployments.lora import load_with, write_lora
from tests.serve_app.page.browser import Page, rgb

pytestmark = pytest.mark.slow
MODEL = "tiny"
SEED = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters `a`, also for the text encoders, and `b`; and `c`, of another model, which the app is not given."""
    folder = tmp_path_factory.mktemp("lora")
    for seed, (name, tiny) in enumerate({"a": "flux", "b": "flux", "c": "wan"}.items()):
        write_lora(folder / name, fetch_checkpoint(f"tiny://{tiny}", ()), seed=seed, texts=name == "a")
    (folder / "watched").mkdir()
    return folder


@pytest.fixture(scope="module")
def url(serve_url: str, files: Path) -> Iterator[str]:
    part = {"num_cpus": 0.1}
    config = {
        "model": {
            "name": MODEL,
            "checkpoint": "tiny://flux",
            "defaults": {"width": 64, "height": 64, "num_inference_steps": 4},
            "adapters": {
                "a": {"source": str(files / "a"), "about": "soft"},
                "b": {"source": str(files / "b"), "scale": 0.6},
            },
            "adapters_folder": str(files / "watched"),
        },
        "encoder": part | {"max_sequence_length": TEXT_TOKENS},
        "transformer": part | {"shards": 2},
        "vae": part,
        "ingress": {"num_replicas": 1},
    }
    serve.run(build_app(parse_app_config(config)), name="adapters", route_prefix="/adapters")
    yield f"{serve_url}/adapters"
    serve.delete("adapters")


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def peft(files: Path) -> Callable[..., np.ndarray]:
    """Returns `peft(prompt, a=1.0)`, which draws with plain diffusers and these adapters, at these scales."""
    pipe = load_with(fetch_checkpoint("tiny://flux", ()), {name: files / name for name in "ab"})

    @cache
    def draw(prompt: str, **scales: float) -> np.ndarray:
        pipe.set_adapters(["a", "b"], [scales.get(name, 0.0) for name in "ab"])
        settings = {"width": 64, "height": 64, "num_inference_steps": 4, "max_sequence_length": TEXT_TOKENS}
        generator = torch.Generator("cpu").manual_seed(SEED)
        return np.asarray(pipe(prompt, generator=generator, **settings).images[0]).astype(int)

    return draw


def ask(client: OpenAI, prompt: str, model: str = MODEL, **extra: Any) -> np.ndarray:
    answer = client.images.generate(model=model, prompt=prompt, extra_body={"seed": SEED} | extra)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))).astype(int)


def test_models_lists_adapters_as_models(client: OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == [MODEL, f"{MODEL}:a", f"{MODEL}:b"]
    assert [each["name"] for each in cards[MODEL].adapters] == ["a", "b"]
    assert (cards[f"{MODEL}:a"].parent, cards[f"{MODEL}:a"].about) == (MODEL, "soft")
    assert client.models.retrieve(f"{MODEL}:b").id == f"{MODEL}:b"


def test_a_client_that_knows_of_models_alone_chooses_an_adapter(
    client: OpenAI, peft: Callable[..., np.ndarray]
) -> None:
    """The adapter is used at the scale of the config."""
    drawn = ask(client, "a cat", model=f"{MODEL}:b")
    assert np.abs(drawn - peft("a cat", b=0.6)).max() <= 1
    assert np.abs(drawn - ask(client, "a cat")).max() > 1


def test_four_requests_at_once_over_one_the_other_both_and_none_are_each_as_alone_and_fly_merged(
    client: OpenAI, url: str, peft: Callable[..., np.ndarray]
) -> None:
    scales: list[dict[str, float]] = [{"a": 1.0}, {"b": 0.7}, {"a": 0.5, "b": -0.4}, {}]
    asked = [(f"dog {i % 4}", scales[i % 4]) for i in range(16)]

    def draw(prompt: str, of: dict[str, float]) -> np.ndarray:
        return ask(client, prompt, lora=[{"name": name, "scale": scale} for name, scale in of.items()])

    with ThreadPoolExecutor(len(asked)) as threads:
        drawn = list(threads.map(draw, *zip(*asked, strict=True)))
    for pixels, (prompt, of) in zip(drawn, asked, strict=True):
        assert np.abs(pixels - peft(prompt, **of)).max() <= 1, (prompt, of)
    time.sleep(1.5)  # the status may be a second old
    [transformer] = httpx.get(f"{url}/v1/status").json()["transformer"]["replicas"]
    assert max(map(int, transformer["queue"]["batch_sizes"])) > 1
    assert set(transformer["adapters"]) == {"a", "b"}


def test_an_adapter_that_is_put_into_the_folder_is_served(
    client: OpenAI, files: Path, peft: Callable[..., np.ndarray]
) -> None:
    shutil.copy(files / "a" / USUAL_NAME, files / "watched" / "later.safetensors")
    time.sleep(1.1)
    assert f"{MODEL}:later" in [card.id for card in client.models.list()]
    assert np.abs(ask(client, "a cat", model=f"{MODEL}:later") - peft("a cat", a=1.0)).max() <= 1


def test_one_that_is_not_there_is_a_404_that_lists_what_there_is(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="served: a, b") as refused:
        ask(client, "a cat", lora=[{"name": "c"}])
    assert refused.value.param == "lora"
    with pytest.raises(NotFoundError, match="served: a, b"):
        ask(client, "a cat", model=f"{MODEL}:c")
    with pytest.raises(NotFoundError, match="served: a, b"):
        client.models.retrieve(f"{MODEL}:c")


def test_one_of_another_model_is_a_400_that_names_a_layer(client: OpenAI, files: Path) -> None:
    shutil.copytree(files / "c", files / "watched" / "foreign")
    time.sleep(1.1)
    with pytest.raises(BadRequestError, match=r"'foreign'.*attn1\.to_q") as refused:
        ask(client, "a cat", model=f"{MODEL}:foreign")
    assert refused.value.param == "lora"
    shutil.rmtree(files / "watched" / "foreign")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ([{"name": "a"}, {"name": "a"}], "twice"),
        ([{"name": "a", "scale": 11}], "scale"),
        ([{"name": "a", "weight": 1}], "weight"),
        ([{"scale": 1}], "name"),
        ([{"name": "a"}] * 9, "8"),
    ],
)
def test_what_is_wrong_with_lora_is_a_400_that_says_it(client: OpenAI, lora: list[Any], words: str) -> None:
    with pytest.raises(BadRequestError, match=words) as refused:
        ask(client, "a cat", lora=lora)
    assert str(refused.value.param).startswith("lora")


def test_a_form_takes_lora_as_json(client: OpenAI, url: str) -> None:
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(image, "PNG")
    asked = {"model": MODEL, "prompt": "a cat", "image": ("in.png", image.getvalue())}
    extra = {"seed": SEED, "strength": 0.5}
    plain = client.images.edit(**asked, extra_body=extra)
    named = client.images.edit(**asked, extra_body=extra | {"lora": json.dumps([{"name": "a"}])})
    assert plain.data[0].b64_json != named.data[0].b64_json


def test_the_page_mixes_in_as_much_as_its_slider_says(page: Page, url: str) -> None:
    page.open(f"{url}/")
    page.unfold("#adapters")
    page.one("#lora [type=checkbox]").click()
    page.type("#lora [type=number]", "0.5")
    page.draw("a cat", seed=SEED)
    body = {"prompt": "a cat", "seed": SEED, "lora": [{"name": "a", "scale": 0.5}]}
    [expected] = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).json()["data"]
    assert page.pixels() == rgb(base64.b64decode(expected["b64_json"]))
