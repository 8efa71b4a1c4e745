"""Tests that a served app answers any request in time, in the API's form and without a 5xx.

Requests are generated from the API's description (schemathesis) and from arbitrary JSON and forms (hypothesis);
others have files that are not images, or are HTTP that no library would send.
"""

import json
import socket
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.app import PATIENCE_S, App
from tests.serve_app.pictures import SIDE, chunk, data_url, file, noise, png_of

pytestmark = pytest.mark.slow
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
USUAL, THOROUGH = 8, 150
"""Number of examples of each kind, by default and with --thorough."""
FEW = pytest.param(USUAL, id="few")
MANY = pytest.param(THOROUGH, id="many", marks=pytest.mark.thorough)
how_many = pytest.mark.parametrize("num_examples", [FEW, MANY])


@pytest.fixture(scope="module")
def app(start_ingress: Callable[..., App]) -> App:
    return start_ingress(
        "fuzzed", max_pixels=64 * 64, max_num_inference_steps=2, max_image_pixels=512 * 512, request_timeout_s=50.0
    )


def bounded(num_examples: int) -> settings:
    """Returns settings with which every run has the same examples."""
    return settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


def check_answer(status: int, body: bytes) -> None:
    """Asserts that an answer is not a 5xx, and that an error has the API's form."""
    assert 200 <= status < 500, body[:500]
    if status >= 400:
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]


@how_many
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_by_its_own_description(app: App, num_examples: int, mode: GenerationMode) -> None:
    """Sends every operation what the description allows, or what it does not."""
    schema = schemathesis.openapi.from_dict(app.client.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 9
    asked = [each.label for each in operations if _ask_by_description(app, each, num_examples, mode)]
    assert {f"POST {GENERATIONS}", f"POST {EDITS}", "GET /v1/images/jobs"} <= set(asked)


def _ask_by_description(app: App, operation: Any, num_examples: int, mode: GenerationMode) -> bool:
    """Returns whether there was anything to send: for some operations no request is invalid."""

    @bounded(num_examples)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        answer = case.call(base_url=app.url, timeout=PATIENCE_S)
        check_answer(answer.status_code, answer.content)
        case.validate_response(answer, checks=[status_code_conformance, response_schema_conformance])

    try:
        ask()
    except Unsatisfiable:
        return False
    return True


FIELDS = (
    *("prompt", "model", "size", "n", "seed", "quality", "num_inference_steps", "guidance_scale", "stream"),
    *("output_format", "output_compression", "partial_images", "progress", "lora", "step_cache", "image", "mask"),
    *("strength", "background", "user", "negative_prompt", "scheduler", "response_format", "prompt_weighting"),
)
ODD = st.sampled_from(
    [
        "",
        "\ud800",
        "\x00",
        "auto",
        "64x64",
        "1x100000",
        "9" * 5000,
        -1,
        0,
        2**63,
        10**400,
        1e308,
        True,
        None,
        [],
        {},
    ]
)
VALUES = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=10), VALUES, max_size=6)


@how_many
@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_by_bodies_of_any_json(app: App, num_examples: int, path: str) -> None:
    @bounded(4 * num_examples)
    @given(body=BODIES, prompt=st.sampled_from([{}, {"prompt": "a cat"}]), cut=st.none() | st.integers(0, 200))
    def ask(body: dict[str, Any], prompt: dict[str, str], cut: int | None) -> None:
        text = json.dumps(prompt | body).encode()[:cut]
        answer = app.client.post(path, content=text, headers={"content-type": "application/json"})
        check_answer(answer.status_code, answer.content)

    ask()


PARTS = st.lists(
    st.tuples(
        st.sampled_from([*FIELDS, "image[]", "", 'a"b', "é"]),
        st.sampled_from([None, "a.png", "", "../../etc/passwd", "\x00"]),
        st.binary(max_size=60) | st.sampled_from([b"a cat", b"2", b"64x64", file(noise()), b"\xff\xfe"]),
    ),
    max_size=5,
)


@how_many
def test_by_forms_of_any_parts(app: App, num_examples: int) -> None:
    @bounded(4 * num_examples)
    @given(parts=PARTS, ends=st.sampled_from([b"--B--\r\n", b"--B", b"", b"--C--\r\n"]))
    def ask(parts: list[tuple[str, str | None, bytes]], ends: bytes) -> None:
        body = b"".join(_part(*part) for part in parts) + ends
        answer = app.client.post(EDITS, content=body, headers={"content-type": "multipart/form-data; boundary=B"})
        check_answer(answer.status_code, answer.content)

    ask()


def _part(name: str, filename: str | None, data: bytes) -> bytes:
    named = "" if filename is None else f'; filename="{filename}"'
    return f'--B\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return file(noise(), "JPEG", exif=exif)


def _animated(kind: str) -> bytes:
    first, *others = [noise(seed) for seed in range(3)]
    return file(first, kind, save_all=True, append_images=others)


PNG = file(noise())
PICTURES: dict[str, tuple[bytes, bool]] = {
    "png": (PNG, True),
    "turned by EXIF": (_turned(), True),
    "CMYK": (file(noise().convert("CMYK"), "JPEG"), True),
    "16 bits": (file(Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16))), True),
    "grey with alpha": (file(noise().convert("LA")), True),
    "palette": (file(noise().convert("P")), True),
    "one bit": (file(noise().convert("1")), True),
    "animated PNG": (_animated("PNG"), True),
    "animated WebP": (_animated("WEBP"), True),
    "animated GIF": (_animated("GIF"), False),
    "BMP": (file(noise(), "BMP"), False),
    "TIFF": (file(noise(), "TIFF"), False),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', False),
    "nothing": (b"", False),
    "text": (b"not an image", False),
    "only the magic": (PNG[:8], False),
    "cut in the header": (PNG[:20], False),
    "cut in the pixels": (PNG[: len(PNG) // 2], False),
    "wrong magic": (b"\xff\xd8\xff" + PNG[3:], False),
    "bomb": (png_of(65_000, 65_000), False),
    "1 x 100000": (png_of(1, 100_000), False),
    "no size": (png_of(0, 0), False),
    "endless text chunk": (png_of(SIDE, SIDE, chunk(b"zTXt", b"k\0\0" + b"x" * 10)), False),
}
"""Files, and whether each may be accepted; if not, it must be refused."""


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("way", ["form", "JSON"])
def test_by_pictures(app: App, name: str, way: str) -> None:
    data, may_be_taken = PICTURES[name]
    asked = {"prompt": "a cat", "num_inference_steps": 2}
    if way == "form":
        answer = app.client.post(EDITS, data=asked, files={"image": ("a.png", data)})
    else:
        answer = app.client.post(EDITS, json=asked | {"image": data_url(data)})
    check_answer(answer.status_code, answer.content)
    if not may_be_taken:
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"].startswith("image")


def _long_json(text: bytes) -> bytes:
    return (
        b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close"
        b"\r\n\r\n%s" % (GENERATIONS.encode(), len(text), text)
    )


REQUESTS: dict[str, bytes] = {
    "deep JSON": _long_json(b"[" * 100_000),
    "deep objects": _long_json(b'{"a":' * 50_000),
    "a key twice": _long_json(b'{"prompt": "a", "prompt": 1}'),
    "half a character": _long_json(b'{"prompt": "\\ud800"}'),
    "NaN": _long_json(b'{"prompt": "a", "guidance_scale": NaN}'),
    "Infinity": _long_json(b'{"prompt": "a", "guidance_scale": -Infinity}'),
    "huge integer": _long_json(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"),
    "huge exponent": _long_json(b'{"prompt": "a", "seed": 1e999}'),
    "zeros": _long_json(b"\0" * 1000),
    "chunks": b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
    b"connection: close\r\n\r\n2\r\n{}\r\n0\r\n\r\n" % GENERATIONS.encode(),
    "bad chunks": b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\nzz\r\n{}"
    % GENERATIONS.encode(),
    "two lengths": b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}"
    % GENERATIONS.encode(),
    "wrong type": b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\ncontent-length: 2\r\n"
    b"connection: close\r\n\r\n{}" % GENERATIONS.encode(),
    "wrong method": b"PATCH %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % GENERATIONS.encode(),
    "OPTIONS": b"OPTIONS %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % GENERATIONS.encode(),
    "no such method": b"BREW %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % GENERATIONS.encode(),
    "a giant header": b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"x" * 70_000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 2000 + b"\r\n",
    "no host": b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n",
    "a path of %": b"GET /%ff%fe%00/.. HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.fixture
def connection(app: App) -> Iterator[socket.socket]:
    url = app.client.base_url
    with socket.create_connection((url.host, url.port), timeout=PATIENCE_S) as connected:
        yield connected


@pytest.mark.parametrize("name", REQUESTS)
def test_by_odd_http(app: App, connection: socket.socket, name: str) -> None:
    connection.sendall(REQUESTS[name].replace(b" /", f" /{app.name}/".encode(), 1))
    answer = BytesIO()
    try:
        while piece := connection.recv(2**16):
            answer.write(piece)
    except ConnectionResetError:  # the server closed while there was more to read
        pass
    head, _, body = answer.getvalue().partition(b"\r\n\r\n")
    assert head, "no answer"
    check_answer(int(head.split()[1]), body)


def test_head_is_get_without_a_body(app: App) -> None:
    for path in ("/health", "/v1/models", GENERATIONS, "/none"):
        asked = app.client.head(path)
        assert asked.status_code == app.client.get(path).status_code
        assert asked.content == b""
