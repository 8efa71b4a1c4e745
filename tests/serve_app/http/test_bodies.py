"""Tests, without a server, that a body that cannot be read gets a 400 in the API's form that says why."""

import asyncio
import gzip
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deployments.checkpoints.geometry import with_geometry
from deployments.config.model import DefaultsConfig, ModelConfig
from serve_app.config.limits import LimitsConfig
from serve_app.errors import MAX_QUOTED_CHARACTERS
from serve_app.http import body_limit
from serve_app.inputs.pictures import blank_png
from serve_app.models.served_models import Models
from serve_app.relay import Relay
from serve_app.routes import build_api

JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
HALF = '"half a cat \\ud83d"'


def build(family: str) -> FastAPI:
    defaults = DefaultsConfig(width=64, height=64, num_inference_steps=2)
    model = ModelConfig(name="m", checkpoint=f"tiny://{family}", family=family, defaults=defaults)
    return build_api(Models([Relay(with_geometry(model), LimitsConfig(), None, None, None)]))


IMAGES, VIDEOS = build("flux"), build("wan")


def ask(api: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    async def answer() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://relay") as client:
            return await client.request(method, path, **request)

    return asyncio.run(answer())


def post(body: str | bytes, headers: dict[str, str] = JSON, api: FastAPI = IMAGES) -> dict[str, Any]:
    """Posts the body and returns the error of the 400."""
    path = "/v1/images/generations" if api is IMAGES else "/v1/videos/sync"
    answer = ask(api, "POST", path, content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("api", [IMAGES, VIDEOS], ids=["images", "videos"])
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{"prompt": "un café"}'.encode("latin-1"), r"the body is not UTF-8 (byte 18: 0xe9)"),
        ('{"prompt": "红猫"}'.encode("gbk"), "the body is not UTF-8 (byte 12: 0xba)"),
        ('{"prompt": "a cat"}'.encode("utf-16"), "the body is not UTF-8 (byte 0: 0xff)"),
        (gzip.compress(b'{"prompt": "a cat"}'), "it looks like gzip: no Content-Encoding is accepted"),
        (b"\x28\xb5\x2f\xfd\x24\xff", "it looks like zstd"),
    ],
    ids=["latin-1", "gbk", "utf-16", "gzip", "zstd"],
)
def test_a_body_that_is_not_utf_8_says_so(api: FastAPI, body: bytes, told: str) -> None:
    assert told in post(body, api=api)["message"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "x" * 1000])
def test_a_content_encoding_is_refused_by_its_name(encoding: str) -> None:
    message = post(b"{}", JSON | {"content-encoding": encoding})["message"]
    assert message.startswith("Content-Encoding: ")
    assert "is not accepted" in message
    assert len(message) < 200


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""], ids=["byte-order-mark", "none"])
def test_identity_is_no_encoding_and_a_byte_order_mark_no_text(start: bytes) -> None:
    """Windows programs write a byte order mark."""
    assert post(start + b'{"prompt": ""}', JSON | {"content-encoding": "identity"})["param"] == "prompt"


PART = b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n%s\r\n--b--'


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/x-www-form-urlencoded", b"prompt=un+caf%E9"),
        ("application/x-www-form-urlencoded", b"prompt=un caf\xe9"),
        ("multipart/form-data; boundary=b", PART % b"caf\xe9"),
    ],
    ids=["percent", "raw", "multipart"],
)
def test_a_form_is_utf_8_as_well(content_type: str, body: bytes) -> None:
    post(body, {"content-type": content_type}, VIDEOS)


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--b\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"


def form(*parts: bytes, end: bytes = b"--b--\r\n", content_type: str = "multipart/form-data; boundary=b") -> Any:
    return {"content": b"".join(parts) + end, "headers": {"content-type": content_type}}


def edit(*parts: bytes, **options: Any) -> httpx.Response:
    return ask(IMAGES, "POST", "/v1/images/edits", **form(*parts, **options))


CAT = part("prompt", b"a cat")


@pytest.mark.parametrize(
    ("sent", "param", "told"),
    [
        (
            form(CAT, part("image", blank_png(), "x"), end=b""),
            None,
            "it is cut short: its last boundary is missing",
        ),
        (form(CAT, part("image", blank_png(), "x")[:-20], end=b""), None, "cut short"),
        (form(CAT), "image", "image is missing: send the image to begin with"),
        (form(CAT, part("image", b"cat.png")), "image", "neither a file (in curl: -F image=@FILE)"),
        (form(CAT, part("image", b"GIF89a", "cat.png")), "image", "it is a GIF"),
        (form(CAT, part("image[]", b"GIF89a", "cat.png")), "image", "it is a GIF"),
        (form(CAT, *[part("image[]", blank_png(), "x")] * 2), "image", "takes at most 1, got 2"),
        (
            form(CAT, *[part("image", blank_png(), "x")] * 21),
            None,
            "Maximum number of files is 20",
        ),
        (form(CAT, part("image", b"", "x")), "image", "it is empty"),
        (form(part("prompt", b"caf\xe9"), part("image", blank_png(), "x")), None, "the form is not UTF-8 (0xe9"),
        (form(part("prompt", b"a cat", "x"), part("image", blank_png(), "x")), "prompt", "valid string"),
        (form(CAT, content_type="multipart/form-data"), None, "Missing boundary"),
        (form(CAT, content_type="multipart/form-data; boundary=c"), None, "the form cannot be read"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_form_with_files_that_is_wrong_says_so(sent: dict[str, Any], param: str | None, told: str) -> None:
    answer = ask(IMAGES, "POST", "/v1/images/edits", **sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], told in error["message"]) == (400, param, True), error


def test_a_forms_own_charset_changes_nothing() -> None:
    """The prompt is read all the same: only the size is refused."""
    parts = (part("prompt", "un café".encode()), part("image", blank_png(), "x"), part("size", b"1x1"))
    answer = edit(*parts, content_type="multipart/form-data; charset=ascii; boundary=b")
    assert answer.json()["error"]["param"] == "size"


def test_a_body_has_room_for_pictures_only_where_they_go_in() -> None:
    long = b" " * 2**21
    for path, status in (("/v1/images/generations", 413), ("/v1/images/edits", 400)):
        assert ask(IMAGES, "POST", path, content=long, headers=JSON).status_code == status
    answer = ask(IMAGES, "POST", "/v1/images/edits", content=b" " * (2 * 28 * 2**20), headers=JSON)
    assert answer.status_code == 413
    too_long = b" " * (86 * 2**20)  # the limit is 64 MiB of video in base64, 4 bytes for every 3
    assert ask(VIDEOS, "POST", "/v1/videos/sync", content=too_long, headers=JSON).status_code == 413


def test_too_many_bytes_at_once_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "MAX_BYTES_AT_ONCE", 1000)
    for _ in range(3):
        assert edit(CAT, part("image", b"GIF89a", "x")).status_code == 400
    answer = edit(CAT, part("image", bytes(2000), "x"))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "user", "safety_identifier", "model", "size"])
@pytest.mark.parametrize("api", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_half_a_character_is_refused_by_its_fields_name(api: FastAPI, field: str) -> None:
    others = "" if field == "prompt" else '"prompt": "a cat", '
    error = post("{" + others + f'"{field}": {HALF}' + "}", api=api)
    assert error["param"] == field
    assert "character 11 is half a character" in error["message"]


@pytest.mark.parametrize("field", ["output_format", "quality", "stream", "n", "\\ud83d", "a\\u0000b\\n"])
def test_half_a_character_elsewhere_does_no_harm(field: str) -> None:
    assert post("{" + f'"prompt": "a cat", "{field}": {HALF}' + "}")["code"] == "invalid_value"


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "fields",
    [
        {LONG: 1},
        {"model": LONG},
        {"size": LONG},
        {"output_format": LONG},
        {"seed": LONG},
        {"num_inference_steps": 10**4000},
        {"n": [LONG[:9000]] * 9},
        {"prompt": {LONG: LONG}},
        {"user": [[LONG]]},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_what_was_sent_comes_back_cut(fields: dict[str, Any]) -> None:
    answer = ask(IMAGES, "POST", "/v1/images/generations", json={"prompt": "a cat"} | fields)
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 1000
    assert len(answer.json()["error"]["param"]) <= MAX_QUOTED_CHARACTERS + 2


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/" + LONG[:50_000], {}),
        ("GET", "/v1/models/" + LONG[:50_000], {}),
        ("POST", "/v1/images/generations", {"content-type": LONG}),
        (LONG, "/v1/models", {}),
    ],
    ids=["path", "model", "content-type", "method"],
)
def test_a_long_path_method_or_header_comes_back_cut(method: str, path: str, headers: dict[str, str]) -> None:
    assert len(ask(IMAGES, method, path, headers=headers, content=b"{}").content) < 500


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("steps", "did you mean num_inference_steps?"),
        ("width", "did you mean size?"),
        ("height", "did you mean size?"),
        ("cfg", "use guidance_scale or true_cfg_scale"),
        ("batch_size", "did you mean n?"),
        ("Negative-Prompt", "did you mean negative_prompt?"),
        ("promt", "did you mean prompt?"),
        ("sampler", "did you mean scheduler?"),
        ("colour", "known: background, deadline_s, guidance_scale,"),
    ],
)
def test_an_unknown_field_says_what_may_be_meant(field: str, told: str) -> None:
    error = post(json.dumps({"prompt": "a cat", field: 1}))
    assert error["param"] == field
    assert told in error["message"]


@pytest.mark.parametrize("value", ['"3"', "true", "1.5", "[1]"])
def test_json_spells_a_number_as_a_number(value: str) -> None:
    assert post(f'{{"prompt": "a cat", "n": {value}}}')["param"] == "n"


def test_four_point_nought_is_a_whole_number() -> None:
    """The numbers are accepted: only the size is refused."""
    assert post('{"prompt": "a cat", "n": 4.0, "num_inference_steps": 2.0, "size": "1x1"}')["param"] == "size"


def test_a_form_spells_everything_as_a_text() -> None:
    assert post("prompt=waves&num_frames=5&fps=8&seed=3&size=1x1", FORM, VIDEOS)["param"] == "size"


def test_an_unknown_field_is_refused_whatever_it_is() -> None:
    assert post('{"prompt": "a cat", "colour": null}')["param"] == "colour"


@pytest.mark.parametrize(
    "path", ["/images/generations", "/videos/sync", "/models", "/status", "/prefix/images/generations"]
)
def test_a_base_url_without_v1_is_told_so(path: str) -> None:
    answer = ask(IMAGES, "POST", path, json={"prompt": "a cat"})
    assert answer.status_code == 404
    assert "add /v1" in answer.json()["error"]["message"]


def test_head_is_get_without_its_body_and_other_methods_say_what_there_is() -> None:
    assert ask(IMAGES, "HEAD", "/v1/models").status_code == 200
    assert ask(IMAGES, "HEAD", "/docs").status_code == 200
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
        answer = ask(IMAGES, method, "/v1/images/generations")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_api_page_loads_nothing_from_elsewhere() -> None:
    page = ask(IMAGES, "GET", "/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "//" not in page.text.replace("/** ", "")
    script = ask(IMAGES, "GET", "/page/docs.js")
    assert "openapi.json" in script.text
    assert ask(IMAGES, "GET", "/redoc").status_code == 404
