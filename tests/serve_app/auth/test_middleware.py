"""Tests of keys over HTTP: who may send requests, and limits that two ingresses count together."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from fastapi import FastAPI, Request
from openai import AuthenticationError, RateLimitError
from ray._private import worker as ray_worker
from starlette.testclient import TestClient

from serve_app.auth.keys import read_keys, write_keys
from serve_app.auth.middleware import OPEN_PATHS, add_access
from serve_app.errors import Unauthorized
from tests.app import App
from tests.keyed_app import CAT, ENDLESS, GENERATIONS, ORIGIN, UNMEASURED, UNMEASURED_TOO, KeyedApp

pytestmark = pytest.mark.slow


def test_who_has_a_key_gets_a_picture_by_the_unmodified_client(keyed_app: KeyedApp, flux_app: App) -> None:
    with keyed_app.openai(keyed_app.secrets["shop"]) as client:
        answer = client.images.generate(prompt="a cat", extra_body={"seed": 1})
    [expected] = flux_app.client.post(GENERATIONS, json=CAT).json()["data"]
    assert answer.data[0].b64_json == expected["b64_json"]


def test_the_client_raises_an_authentication_error_for_a_wrong_key(keyed_app: KeyedApp) -> None:
    with keyed_app.openai("relay-wrong") as client, pytest.raises(AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Basic KEY",
        "KEY",
        "Bearer KEYx",
        "Bearer x KEY",
        "Bearer \xff",
        "Bearer none",
    ],
)
def test_without_a_key_that_opens_the_answer_is_a_401_that_says_what_to_do(
    keyed_app: KeyedApp, authorization: str | None
) -> None:
    secret = keyed_app.secrets["shop"]
    sent = None if authorization is None else authorization.replace("KEY", secret).encode("latin-1")
    answer = keyed_app.app.client.get("/v1/models", headers={} if sent is None else {"Authorization": sent})
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert secret not in answer.text
    assert (
        "Authorization: Bearer KEY" in error["message"]
        or "ask the server's operator for another" in error["message"]
    )


@pytest.mark.parametrize("authorization", ["bearer KEY", "BEARER KEY", "Bearer  KEY"])
def test_the_scheme_is_read_as_http_says(keyed_app: KeyedApp, authorization: str) -> None:
    headers = {"Authorization": authorization.replace("KEY", keyed_app.secrets["shop"])}
    assert keyed_app.app.client.get("/v1/models", headers=headers).status_code == 200


def test_a_key_is_not_taken_from_the_address(keyed_app: KeyedApp) -> None:
    """A key in the URL would be in the logs of every proxy on the way."""
    for name in ("key", "api_key", "access_token"):
        assert (
            keyed_app.app.client.get("/v1/models", params={name: keyed_app.secrets["address"]}).status_code == 401
        )


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/health"])
def test_pages_and_health_need_no_key(keyed_app: KeyedApp, path: str) -> None:
    assert keyed_app.ask(None, "GET", path).status_code == 200
    assert path in OPEN_PATHS


def test_all_other_paths_need_one(keyed_app: KeyedApp) -> None:
    described = keyed_app.ask(None, "GET", "/openapi.json").json()["paths"]
    paths = {path.replace("{name}", "health") for path in described} | {"/v1/videos/sync", "/v1/models/docs"}
    paths |= {"/nothing", "//health", "/health/", "/Health", "/health%2F", "/docs/x", "/%68ealth/x", "/*"}
    closed = paths - OPEN_PATHS
    assert len(closed) > 10
    for path in closed:
        for method in ("GET", "POST", "OPTIONS", "HEAD", "DELETE"):
            answer = keyed_app.app.client.request(method, keyed_app.app.url + path)
            assert answer.status_code == 401, (method, path)


def test_a_client_that_has_a_key_learns_what_is_not_there(keyed_app: KeyedApp) -> None:
    assert keyed_app.ask("shop", "GET", "/nothing").status_code == 404


def test_a_rate_counts_what_all_ingresses_have_taken(keyed_app: KeyedApp) -> None:
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda _: keyed_app.ask("rated", "GET", "/v1/models"), range(24)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 19
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    with keyed_app.openai(keyed_app.secrets["rated"]) as client, pytest.raises(RateLimitError):
        client.images.generate(prompt="a cat")


def test_one_more_at_once_is_refused_until_one_has_ended(keyed_app: KeyedApp) -> None:
    endless = CAT | {"size": UNMEASURED, "num_inference_steps": ENDLESS, "stream": True, "progress": True}
    headers = {"Authorization": f"Bearer {keyed_app.secrets['alone']}"}
    with keyed_app.app.client.stream("POST", GENERATIONS, json=endless, headers=headers) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        refused = [keyed_app.ask("alone", "GET", "/v1/models") for _ in range(8)]
    assert {each.status_code for each in refused} == {429}
    assert all(int(each.headers["Retry-After"]) >= 1 for each in refused)
    deadline = time.monotonic() + 30
    while keyed_app.ask("alone").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_budget_is_used_by_what_is_drawn_and_then_it_is_told_when_the_next_begins(
    keyed_app: KeyedApp,
) -> None:
    assert keyed_app.ask("poor", json=CAT | {"n": 2}).status_code == 200
    assert keyed_app.ask("poor", json=CAT | {"n": 2}).status_code == 429
    assert keyed_app.ask("poor", json=CAT | {"num_inference_steps": 5}).status_code == 429
    assert keyed_app.ask("poor", "GET", "/v1/models").status_code == 200
    assert keyed_app.ask("poor").status_code == 200
    refused = keyed_app.ask("poor")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (429, "insufficient_quota", "insufficient_quota")
    assert re.search(r"the next month begins at \d{4}-\d\d-01T00:00Z", error["message"])
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.headers["x-should-retry"] == "false"
    with keyed_app.openai(keyed_app.secrets["poor"]) as client, pytest.raises(RateLimitError) as raised:
        client.images.generate(prompt="a cat")
    assert raised.value.code == "insufficient_quota"


def test_one_request_of_a_key_may_cost_so_much_and_the_refusal_says_what_to_lower(keyed_app: KeyedApp) -> None:
    assert keyed_app.ask("small", json=CAT | {"n": 2}).status_code == 200
    refused = keyed_app.ask("small", json=CAT | {"n": 3})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "n")
    assert "'small'" in error["message"]
    assert "2 or less" in error["message"]


def test_what_is_refused_as_wrong_costs_nothing(keyed_app: KeyedApp) -> None:
    for _ in range(6):
        assert keyed_app.ask("poorer", json=CAT | {"size": "1x1"}).status_code == 400
    assert keyed_app.ask("poorer", json=CAT | {"n": 4}).status_code == 200
    assert keyed_app.ask("poorer").status_code == 429


def test_what_fails_in_a_stream_that_had_begun_is_given_back(keyed_app: KeyedApp) -> None:
    """The first request cannot meet its deadline and is refunded. The second has none: it is charged although its
    client leaves."""
    body = CAT | {"size": UNMEASURED_TOO, "num_inference_steps": ENDLESS, "stream": True, "progress": True}
    answer = keyed_app.ask("hasty", json=body | {"deadline_s": 10})
    assert '"code": "deadline_exceeded"' in answer.text.partition("event: error")[2]
    headers = {"Authorization": f"Bearer {keyed_app.secrets['hasty']}"}
    with keyed_app.app.client.stream("POST", GENERATIONS, json=body, headers=headers) as again:
        assert again.status_code == 200
    assert keyed_app.ask("hasty", json=body).status_code == 429


def test_the_same_job_asked_for_again_is_charged_once(keyed_app: KeyedApp) -> None:
    body = CAT | {"background": True, "num_inference_steps": 6}
    ids = set()
    for _ in range(4):
        answer = keyed_app.ask("frugal", json=body, headers={"Idempotency-Key": "one"})
        assert answer.status_code == 202, answer.text
        ids.add(answer.json()["id"])
    assert len(ids) == 1
    assert keyed_app.ask("frugal").status_code == 429


def test_a_job_that_fails_gives_its_key_back_what_it_was_charged(keyed_app: KeyedApp) -> None:
    """The job takes longer than jobs.timeout_s."""
    body = CAT | {"background": True, "num_inference_steps": ENDLESS}
    made = keyed_app.ask("patient", json=body).json()
    assert keyed_app.ask("patient", json=body).status_code == 429
    deadline = time.monotonic() + 90
    while (told := keyed_app.ask("patient", "GET", f"/v1/images/jobs/{made['id']}").json())["status"] != "failed":
        assert time.monotonic() < deadline, told
        time.sleep(0.5)
    assert "jobs.timeout_s" in told["error"]["message"]
    time.sleep(1)
    again = keyed_app.ask("patient", json=body)
    assert again.status_code == 202
    assert keyed_app.ask("patient", "DELETE", f"/v1/images/jobs/{again.json()['id']}").status_code == 200


def test_the_description_says_that_a_key_is_needed(keyed_app: KeyedApp, flux_app: App) -> None:
    described = keyed_app.ask(None, "GET", "/openapi.json").json()
    scheme = {"key": {"type": "http", "scheme": "bearer"}}
    assert (described["security"], described["components"]["securitySchemes"]) == ([{"key": []}], scheme)
    assert described["paths"]["/health"]["get"]["security"] == []
    assert "security" not in flux_app.client.get("/openapi.json").json()


def test_a_key_that_is_revoked_opens_nothing_without_a_restart(keyed_app: KeyedApp) -> None:
    assert keyed_app.ask("revoked", "GET", "/v1/models").status_code == 200
    write_keys(keyed_app.file, [key for key in read_keys(keyed_app.file) if key.name != "revoked"])
    time.sleep(2)
    assert {keyed_app.ask("revoked", "GET", "/v1/models").status_code for _ in range(8)} == {401}
    assert keyed_app.ask("shop", "GET", "/v1/models").status_code == 200


def test_a_preflight_needs_no_key_and_a_refusal_can_be_read(keyed_app: KeyedApp) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os",
    }
    preflight = keyed_app.app.client.options(GENERATIONS, headers={"Origin": ORIGIN} | asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    refused = keyed_app.ask(None, headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    answer = keyed_app.ask("shop", headers={"Origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    readable = answer.headers["access-control-expose-headers"].lower()
    assert all(name in readable for name in ("retry-after", "openai-poll-after-ms", "content-range"))


def test_another_origin_is_told_nothing(keyed_app: KeyedApp, flux_app: App) -> None:
    elsewhere = {"Origin": "https://elsewhere.example"}
    assert "access-control-allow-origin" not in keyed_app.ask("shop", headers=elsewhere).headers
    preflight = {"Access-Control-Request-Method": "POST"}
    assert keyed_app.app.client.options(GENERATIONS, headers=elsewhere | preflight).status_code == 400
    assert "access-control-allow-origin" not in flux_app.client.get("/v1/models", headers=elsewhere).headers


def test_a_python_handle_needs_no_key(keyed_app: KeyedApp) -> None:
    [picture] = keyed_app.app.handle.generate.remote(**CAT).result()
    assert picture.media.data


def test_a_lost_counter_stops_nobody(keyed_app: KeyedApp) -> None:
    assert [keyed_app.ask("lost", "GET", "/v1/models").status_code for _ in range(3)] == [200, 429, 429]
    [counter] = processes("ServeReplica:keyed:KeyCounter")
    counter.kill()
    assert keyed_app.ask("lost", "GET", "/v1/models").status_code in (200, 429)
    assert keyed_app.ask("shop").status_code == 200
    deadline = time.monotonic() + 60
    while not processes("ServeReplica:keyed:KeyCounter"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def processes(title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_key_is_in_no_log_and_its_name_is(keyed_app: KeyedApp) -> None:
    """Checks all logs of the Ray session: of proxies, replicas, workers and events."""
    wrong = "relay-a-wrong-key-that-nobody-may-read"
    keyed_app.ask("shop")
    keyed_app.ask("shop", "GET", "/nothing")
    keyed_app.app.client.get("/v1/models", headers={"Authorization": f"Bearer {wrong}"})
    keyed_app.app.client.post(GENERATIONS, headers={"Authorization": f"Bearer {wrong}"}, content=b"no json")
    time.sleep(1)
    logs = Path(ray_worker._global_node.get_session_dir_path()) / "logs"
    text = b"\n".join(path.read_bytes() for path in logs.rglob("*") if path.is_file())
    assert b"key shop" in text
    assert {name for name, secret in keyed_app.secrets.items() if secret.encode() in text} <= {"address"}
    assert wrong.encode() not in text
    usage = next(keyed_app.file.parent.glob("*.usage.json")).read_text()
    assert '"poor"' in usage
    assert not any(secret in usage for secret in keyed_app.secrets.values())


def test_prometheus_sees_keys_by_their_names_and_jobs(keyed_app: KeyedApp) -> None:
    keyed_app.ask("shop")
    keyed_app.ask(None)
    assert keyed_app.ask("shop", json=CAT | {"background": True}).status_code == 202
    expected = (
        r'ray_relay_key_requests_total\{.*code="200".*key="shop"',
        r'ray_relay_key_requests_total\{.*code="401".*key=""',
        r'ray_relay_key_megapixel_steps_total\{.*key="shop"',
        r'ray_relay_jobs\{.*status="queued"',
        r'ray_relay_jobs_ended_total\{.*status="completed"',
    )
    deadline = time.monotonic() + 60
    while True:
        text = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}").text
        if all(re.search(line, text) for line in expected):
            break
        assert time.monotonic() < deadline, text[-2000:]
        time.sleep(1)
    assert not any(secret in text for secret in keyed_app.secrets.values())


@pytest.fixture
def unkeyed() -> Iterator[TestClient]:
    """An application without keys that answers with the key name of the request."""
    api = FastAPI()

    @api.get("/name")
    async def name(request: Request) -> str | None:
        found: str | None = request.state.key_name
        return found

    add_access(api, None, None)
    with TestClient(api) as client:
        yield client


def test_without_auth_a_request_has_no_name_and_any_key_will_do(unkeyed: TestClient) -> None:
    for headers in ({}, {"Authorization": "Bearer none"}):
        answer = unkeyed.get("/name", headers=headers)
        assert (answer.status_code, answer.json()) == (200, None)


def test_an_unauthorized_answer_is_openais() -> None:
    assert Unauthorized("no").headers() == {"WWW-Authenticate": "Bearer"}
