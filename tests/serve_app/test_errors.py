"""Tests that bad input gets a 4xx in OpenAI's form that names the field, and that the server keeps serving."""

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from ray import serve

from deployments.vae import Vae
from tests.app import PATIENCE_S
from tests.keyed_app import ENDLESS, UNMEASURED

pytestmark = pytest.mark.slow
PROMPT = {"prompt": "a cat"}
FORESEEN = r"(: the \d+ steps that are left take at least [\d.e+]+ s, but only [\d.e-]+ s are left)?"
"""The reason that an error gives if a stage foresaw that the deadline cannot be met."""

WRONG_IMAGES: list[tuple[dict[str, Any], str]] = [
    ({"size": "65x64"}, "size"),
    ({"size": "64x"}, "size"),
    ({"size": "0x0"}, "size"),
    ({"size": "big"}, "size"),
    ({"size": "1024x1024"}, "size"),
    ({"size": 64}, "size"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 51}, "num_inference_steps"),
    ({"num_inference_steps": "many"}, "num_inference_steps"),
    ({"n": 0}, "n"),
    ({"n": 11}, "n"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "   "}, "prompt"),
    ({"prompt": "x" * 4001}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"negative_prompt": "x" * 4001}, "negative_prompt"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression"),
    ({"output_compression": 50}, "output_compression"),
    ({"response_format": "url"}, "response_format"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"guidance_scale": -0.5}, "guidance_scale"),
    ({"guidance_scale": 101}, "guidance_scale"),
    ({"true_cfg_scale": "much"}, "true_cfg_scale"),
    ({"prompt": ["a cat", "a dog"]}, "prompt"),
    ({"n": 1.5}, "n"),
    ({"quality": "best"}, "quality"),
    ({"priority": "urgent"}, "priority"),
    ({"priority": 5}, "priority"),
    ({"deadline_s": 0}, "deadline_s"),
    ({"deadline_s": "soon"}, "deadline_s"),
    ({"user": "x" * 513}, "user"),
    ({"background": "transparent"}, "background"),
    ({"num_frames": 5}, "num_frames"),
    ({"colour": "red"}, "colour"),
    ({"partial_images": 2}, "partial_images"),
    ({"progress": True}, "progress"),
    ({"stream": True, "partial_images": 4}, "partial_images"),
    ({"stream": True, "partial_images": -1}, "partial_images"),
    ({"stream": True, "size": "65x64"}, "size"),
    ({"stream": "perhaps"}, "stream"),
]


def check_error(answer: Any, status: int, param: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    return error


@pytest.mark.parametrize(("fields", "param"), WRONG_IMAGES, ids=[f"{k}" for k, _ in WRONG_IMAGES])
def test_a_wrong_field_is_named(flux_app: Any, fields: dict[str, Any], param: str) -> None:
    error = check_error(flux_app.client.post("/v1/images/generations", json=PROMPT | fields), 400, param)
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_value"
    assert param in error["message"]


def test_a_url_is_refused_with_what_there_is_instead(flux_app: Any) -> None:
    answer = flux_app.client.post("/v1/images/generations", json=PROMPT | {"response_format": "url"})
    assert "images are in the answer itself, as b64_json" in check_error(answer, 400, "response_format")["message"]


def test_a_missing_prompt_is_named(flux_app: Any) -> None:
    check_error(flux_app.client.post("/v1/images/generations", json={"n": 1}), 400, "prompt")


@pytest.mark.parametrize(
    "body",
    ["{", "[1]", '"text"', "", b"\xff{", "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"],
    ids=["cut", "list", "text", "nothing", "not-utf8", "nested", "huge-number"],
)
def test_a_body_that_is_no_json_object_is_a_400(flux_app: Any, wan_app: Any, body: str | bytes) -> None:
    headers = {"content-type": "application/json"}
    for app, path in ((flux_app, "/v1/images/generations"), (wan_app, "/v1/videos/sync")):
        answer = app.client.post(path, content=body, headers=headers)
        assert check_error(answer, 400, None)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content_type", "body", "param"),
    [
        ("multipart/form-data", "x", None),
        ("multipart/form-data; boundary=b", "x", None),
        ("application/x-www-form-urlencoded", "prompt=waves&num_frames=6", "num_frames"),
        ("application/x-www-form-urlencoded", "prompt=waves&num_frames=few", "num_frames"),
        ("application/x-www-form-urlencoded", "prompt=waves&colour=red", "colour"),
        ("application/x-www-form-urlencoded", "num_frames=5", "prompt"),
    ],
)
def test_a_wrong_form_is_a_400(wan_app: Any, content_type: str, body: str, param: str | None) -> None:
    answer = wan_app.client.post("/v1/videos/sync", content=body, headers={"content-type": content_type})
    assert check_error(answer, 400, param)["type"] == "invalid_request_error"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_json_that_is_not_called_json_is_refused_by_naming_the_header(
    flux_app: Any, wan_app: Any, content_type: str | None
) -> None:
    """The last one is curl's default."""
    headers = {"content-type": content_type} if content_type else {}
    asked = [(flux_app, "/v1/images/generations")]
    if content_type and "form" in content_type:
        asked.append((wan_app, "/v1/videos/sync"))
    for app, path in asked:
        answer = app.client.post(path, content=json.dumps(PROMPT), headers=headers)
        message = check_error(answer, 400, None)["message"]
        assert message.startswith("send JSON with the header Content-Type: application/json, got ")


def in_pieces(num_bytes: int) -> Iterator[bytes]:
    """Yields a body in pieces, so that it is sent without a Content-Length."""
    for _ in range(num_bytes // 2**16):
        yield b" " * 2**16


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in-pieces"])
def test_a_body_that_is_too_long_is_a_413_that_tells_the_limit(flux_app: Any, wan_app: Any, pieces: bool) -> None:
    headers, texts = {"content-type": "application/json"}, 2**18 + 24 * 4000
    with_video = texts + 64 * 2**20 * 4 // 3  # a data URL
    for app, path, limit in (
        (flux_app, "/v1/images/generations", texts),
        (wan_app, "/v1/videos/sync", with_video),
    ):
        content = in_pieces(limit + 2**20) if pieces else b" " * (limit + 1)
        answer = app.client.post(path, content=content, headers=headers)
        assert f"the limit is {limit} bytes" in check_error(answer, 413, None)["message"]


def test_the_longest_prompts_are_read_whatever_json_makes_of_them(flux_app: Any) -> None:
    fields = {"prompt": "\N{GRINNING FACE}" * 4000, "negative_prompt": "\N{GRINNING FACE}" * 4000}
    answer = flux_app.client.post("/v1/images/generations", json=fields | {"size": "65x64"})
    check_error(answer, 400, "size")


def test_a_file_is_no_prompt(wan_app: Any) -> None:
    check_error(wan_app.client.post("/v1/videos/sync", files={"prompt": ("x.txt", b"waves")}), 400, "prompt")


def test_a_size_error_says_what_is_near(flux_app: Any) -> None:
    answer = flux_app.client.post("/v1/images/generations", json=PROMPT | {"size": "70x100"})
    assert "multiples of 16" in check_error(answer, 400, "size")["message"]
    assert "64x96" in answer.json()["error"]["message"]


def test_a_guidance_that_means_nothing_to_the_family_is_refused(sd15_app: Any) -> None:
    answer = sd15_app.client.post("/v1/images/generations", json=PROMPT | {"true_cfg_scale": 2.0})
    assert "use guidance_scale" in check_error(answer, 400, "true_cfg_scale")["message"]


def test_pictures_of_a_video_model_are_refused_and_the_other_way_round(flux_app: Any, wan_app: Any) -> None:
    answer = wan_app.client.post("/v1/images/generations", json=PROMPT)
    assert "/v1/videos/sync" in check_error(answer, 400, "model")["message"]
    answer = flux_app.client.post("/v1/videos/sync", json=PROMPT)
    assert "/v1/images/generations" in check_error(answer, 400, "model")["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_frames": 6}, "num_frames"),
        ({"num_frames": 37}, "num_frames"),
        ({"num_frames": 0}, "num_frames"),
        ({"seconds": 60}, "seconds"),
        ({"fps": 0}, "fps"),
        ({"size": "64x72"}, "size"),
    ],
)
def test_a_wrong_field_of_a_video_is_named(wan_app: Any, fields: dict[str, Any], param: str) -> None:
    check_error(wan_app.client.post("/v1/videos/sync", json=PROMPT | fields), 400, param)


def test_an_unknown_model_is_a_404(flux_app: Any) -> None:
    answer = flux_app.client.post("/v1/images/generations", json=PROMPT | {"model": "dall-e-3"})
    assert check_error(answer, 404, "model")["code"] == "model_not_found"
    check_error(flux_app.client.get("/v1/models/dall-e-3"), 404, "model")


def test_unknown_paths_and_methods_answer_in_the_same_form(flux_app: Any) -> None:
    for path, status in (("/v1/nothing", 404), ("/v1/images/generations", 405)):
        assert check_error(flux_app.client.get(path), status, None)["type"] == "invalid_request_error"


def test_what_openai_has_and_is_not_here_says_what_to_do_instead(wan_app: Any) -> None:
    with OpenAI(base_url=f"{wan_app.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(BadRequestError, match="makes videos: use /v1/videos/sync"):
            client.images.edit(image=b"a cat", prompt="a cat")
        with pytest.raises(NotFoundError, match="POST the image to /v1/images/edits, with a prompt"):
            client.post("/images/variations", cast_to=object)


def test_the_openai_client_raises_its_own_errors(flux_app: Any) -> None:
    with OpenAI(base_url=f"{flux_app.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(BadRequestError) as wrong:
            client.images.generate(prompt="a cat", size="65x64")
        assert wrong.value.param == "size"
        with pytest.raises(NotFoundError) as unknown:
            client.images.generate(prompt="a cat", model="dall-e-3")
        assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")


def test_after_all_that_the_server_serves(flux_app: Any) -> None:
    assert flux_app.client.post("/v1/images/generations", json=PROMPT).status_code == 200


def test_a_stage_that_raises_is_a_500_that_names_it_and_harms_nobody(flux_app: Any, crossed_app: Any) -> None:
    asked = PROMPT | {"size": "72x72", "num_inference_steps": 2}
    answer = crossed_app.client.post("/v1/images/generations", json=asked)
    error = check_error(answer, 500, None)
    assert (error["type"], error["code"]) == ("server_error", "stage_failed")
    assert error["message"].startswith("the decode stage failed: ValueError")
    assert answer.headers["x-should-retry"] == "false"
    assert flux_app.client.post("/v1/images/generations", json=PROMPT).status_code == 200


def test_health_is_a_503_that_names_the_stage_that_cannot_serve(start_ingress: Callable[..., Any]) -> None:
    answer = start_ingress("halved", vae="Absent").client.get("/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    stages = answer.json()["stages"]
    assert not answer.json()["ok"]
    assert [name for name, state in stages.items() if state != "ok"] == ["vae"]


def test_a_stage_whose_replicas_are_full_is_healthy(flux_app: Any, patient_app: Any) -> None:
    fields = {"prompt": "a cat", "n": 10, "num_inference_steps": ENDLESS}
    running = [patient_app.handle.generate.remote(**fields) for _ in range(4)]
    try:
        told = wait_until_full(patient_app)
        assert told["transformer"]["message"].startswith("1 did not answer: full (max_ongoing_requests)")
        assert told["num_in_progress"] == len(running)
        assert len(told["vae"]["replicas"]) == 1
        stages = patient_app.client.get("/health").json()["stages"]
        assert stages == dict.fromkeys(["encoder", "transformer", "vae"], "ok")
    finally:
        for response in running:
            response.cancel()
    flux_app.wait_for_seats(0)


def wait_until_full(app: Any) -> dict[str, Any]:
    """Waits until the transformer has no room for a call of its stats, and returns the status at that time."""
    deadline = time.monotonic() + PATIENCE_S
    while (status := app.client.get("/v1/status")).json()["transformer"]["replicas"]:
        assert time.monotonic() < deadline, "there never were too many requests for the transformer"
    assert status.status_code == 200
    told: dict[str, Any] = status.json()
    return told


def test_a_redeploy_leaves_no_moment_without_an_ingress(start_ingress: Callable[..., Any]) -> None:
    app = start_ingress("redeployed", max_pixels=64 * 64)
    statuses, seen = set(), []
    with ThreadPoolExecutor(2) as pool:
        redeployed = pool.submit(start_ingress, "redeployed", max_pixels=32 * 32)

        def ask() -> None:
            while not redeployed.done():
                statuses.add(app.client.get("/v1/models").status_code)

        asked = pool.submit(ask)
        while not redeployed.done():
            ingress = serve.status().applications["redeployed"].deployments["Ingress"]
            seen.append(dict(ingress.replica_states))
        asked.result()
    assert statuses == {200}
    assert all(states.get("RUNNING") for states in seen), seen
    assert any(states.get("STARTING") for states in seen), seen
    [model] = app.client.get("/v1/models").json()["data"]
    assert model["limits"]["max_pixels"] == 32 * 32


def test_a_stage_that_sleeps_is_healthy_and_is_not_woken_to_say_so(start_ingress: Callable[..., Any]) -> None:
    """The VAE starts asleep here. It would fail to wake, because it is bound without arguments."""
    scaling = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1}
    vae = serve.deployment(Vae).options(autoscaling_config=scaling).bind()
    app = start_ingress("asleep", vae=vae)
    for _ in range(3):
        answer = app.client.get("/health")
        assert answer.status_code == 200
        assert answer.json()["stages"] == {"encoder": "ok", "transformer": "ok", "vae": "asleep"}
    assert not any(serve.status().applications["asleep"].deployments["Vae"].replica_states.values())


def test_one_request_too_many_gets_a_429_with_retry_after(flux_app: Any, narrow_app: Any) -> None:
    running = narrow_app.handle.generate.remote(prompt="a cat", num_inference_steps=ENDLESS)
    flux_app.wait_for_seats(1)
    answer = narrow_app.client.post("/v1/images/generations", json=PROMPT)
    assert answer.headers["retry-after"] == "5"
    assert check_error(answer, 429, None)["code"] == "overloaded"
    running.cancel()
    flux_app.wait_for_seats(0)
    assert narrow_app.client.post("/v1/images/generations", json=PROMPT).status_code == 200


def test_a_request_past_its_deadline_gets_a_504_and_frees_its_seat(flux_app: Any, hasty_app: Any) -> None:
    asked = PROMPT | {"size": UNMEASURED, "num_inference_steps": ENDLESS}
    error = check_error(hasty_app.client.post("/v1/images/generations", json=asked), 504, None)
    assert re.fullmatch(r"not done within request_timeout_s \(1 s\)" + FORESEEN, error["message"])
    assert error["code"] == "deadline_exceeded"
    flux_app.wait_for_seats(0)


def test_a_request_past_its_own_deadline_gets_a_504_that_names_it_and_frees_its_seat(
    flux_app: Any, patient_app: Any
) -> None:
    asked = PROMPT | {"size": UNMEASURED, "num_inference_steps": ENDLESS, "deadline_s": 0.5}
    error = check_error(patient_app.client.post("/v1/images/generations", json=asked), 504, "deadline_s")
    assert re.fullmatch(r"not done within deadline_s \(0.5 s\)" + FORESEEN, error["message"])
    assert error["code"] == "deadline_exceeded"
    flux_app.wait_for_seats(0)
