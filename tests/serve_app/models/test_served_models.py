"""Tests, without a server, of several models behind one ingress: how they are chosen and listed."""

from typing import Any

import pytest

from serve_app.config.app import ConfigError
from serve_app.config.serve_file import parse_app_config
from serve_app.errors import UnknownModel
from serve_app.models.served_models import Models
from serve_app.routes import build_api
from tests.serve_app.http.test_bodies import ask
from tests.serve_app.http.test_description import build, described

MODEL = {"name": "m", "checkpoint": "tiny://flux"}
ADAPTED = MODEL | {"adapters": {"ink": {"source": "/ink.safetensors"}}}


MODELS = Models([build("flux", "flux"), build("wan", "wan"), build("sd15", "flux:fast")])


def served(*names: str) -> dict[str, Any]:
    return {"models": [{"model": MODEL | {"name": name}} for name in names]}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("flux", "flux"),
        ("wan", "wan"),
        ("flux:fast", "flux:fast"),
        ("flux:fast:ink", "flux:fast"),
        ("flux:ink", "flux"),
    ],
)
def test_a_name_means_the_longest_served_one(name: str, meant: str) -> None:
    assert MODELS.find(name).name == meant


@pytest.mark.parametrize(
    ("path", "meant"), [("/v1/images/generations", "flux"), ("/v1/videos/sync", "wan"), (None, "flux")]
)
def test_who_names_no_model_means_the_first_that_is_asked_there(path: str | None, meant: str) -> None:
    assert MODELS.find(None, path).name == meant


@pytest.mark.parametrize("name", ["", "fluxy", "FLUX", "flux/"])
def test_an_unknown_model_is_told_what_is_served(name: str) -> None:
    with pytest.raises(UnknownModel, match="served: 'flux', 'wan', 'flux:fast'"):
        MODELS.find(name)


def test_every_model_is_listed_by_its_name() -> None:
    answer = ask(build_api(MODELS), "GET", "/v1/models").json()
    assert [card["id"] for card in answer["data"]] == ["flux", "wan", "flux:fast"]
    assert ask(build_api(MODELS), "GET", "/v1/models/flux:fast").json()["id"] == "flux:fast"
    assert ask(build_api(MODELS), "GET", "/v1/models/flux:ink").status_code == 404


def test_a_body_is_judged_by_the_model_it_names() -> None:
    api = build_api(MODELS)
    answer = ask(api, "POST", "/v1/images/generations", json={"model": "wan", "prompt": "waves"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "model 'wan' makes videos: use /v1/videos/sync",
    )
    answer = ask(api, "POST", "/v1/images/generations", json={"model": "dall-e-3", "prompt": "waves"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_each_model_is_described_under_its_name() -> None:
    api = build_api(Models([build("flux", "a"), build("sd15", "b")])).openapi()
    judge = described(api, "/v1/images/generations")
    body = {"prompt": "a cat"}
    assert judge.is_valid(body)
    assert judge.is_valid(body | {"model": None})
    assert judge.is_valid(body | {"model": "a"})
    assert judge.is_valid(body | {"model": "b", "step_cache": {"kind": "taylor_seer"}})
    assert not judge.is_valid(body | {"model": "c"})
    assert judge.is_valid(body | {"model": "a", "size": "64x80"})
    assert not judge.is_valid(body | {"model": "a", "size": "64x72"})
    assert judge.is_valid(body | {"model": "b", "size": "64x72"})


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({}, "model is missing"),
        (served("a", "b") | {"model": MODEL}, "model and models do not combine"),
        (served("a") | {"vae": {}}, "vae and models do not combine"),
        (served("a", "b", "a"), "'a' is taken"),
        (served("a/b", "a b"), "'a b' is taken"),
        (
            {"models": [{"model": ADAPTED}, {"model": MODEL | {"name": "m:ink"}}]},
            r"models\.1.*'m:ink'.* adapter of 'm'",
        ),
        ({"models": {"m": {"model": MODEL}}}, "^models: Input should be a valid tuple, got {'m'"),
        ({"models": [{"model": MODEL, "vea": {}}]}, r"models\.0: unknown key 'vea' \(did you mean 'vae'"),
        ({"models": [{"model": MODEL, "vae": {"num_gpus": -1}}]}, r"models\.0\.vae\.num_gpus"),
    ],
)
def test_a_config_says_one_model_or_several(args: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_app_config(args)


def test_one_model_is_a_list_of_one() -> None:
    one = parse_app_config({"model": MODEL, "vae": {"num_cpus": 2}})
    assert one.served == parse_app_config({"models": [{"model": MODEL, "vae": {"num_cpus": 2}}]}).served
