"""Reads the fields of a request's body from JSON or a form. Unreadable bodies are refused with the reason."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from serve_app.errors import BadRequest, quoted
from serve_app.models.card import ModelLimits

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\x78\x9c": "deflate", b"\x78\xda": "deflate"}
"""First bytes of compressed formats, which no UTF-8 text begins with (for the last two: improbably)."""
FILES = {
    "image": "image",
    "image[]": "image",
    "mask": "mask",
    "control_image": "control_image",
    "input_reference": "input_reference",
    "input_reference[image_url]": "input_reference",
}
"""The body's field for each file name in a form; OpenAI's client sends several images as `image[]`."""
SEVERAL = frozenset({"image"})
MAX_FILES = 20
"""In a form: a few more than any model takes, because validation gives a better error once the form is read."""
MAX_FIELDS = 100
READ_TIMEOUT_S = 120.0
"""For a whole body: 20 MiB in this time are 1.5 Mbit/s."""


async def read_json(request: Request) -> Mapping[str, Any]:
    """Returns the fields of a JSON body. Raises BadRequest."""
    kind = _content_type(request)
    subtype = kind.partition(";")[0].strip().lower().rpartition("/")[2]
    if subtype != "json" and not subtype.endswith("+json"):
        raise _not_called_json(kind)
    try:
        fields = json.loads(await _text(request))
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {_first_sentence(error)}") from error
    if not isinstance(fields, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(fields).__name__}")
    return fields


async def read_json_or_form(request: Request, *, max_text_bytes: int = 2**20) -> tuple[Mapping[str, Any], bool]:
    """Returns the fields, and whether they come from a form, as texts and as bytes of files. Raises BadRequest.

    max_text_bytes: limit of each text in a form with files.
    """
    kind = _content_type(request)
    if "form" not in kind:
        return await read_json(request), False
    if "urlencoded" not in kind:
        return await _read_multipart(request, kind, max_text_bytes), True
    try:
        parse_qsl(await _text(request), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise BadRequest(
            f"the form is not UTF-8 or has over {MAX_FIELDS} fields: {_first_sentence(error)}"
        ) from error
    form = await request.form(max_fields=MAX_FIELDS, max_part_size=max_text_bytes)
    if any(name.startswith("{") for name in form):
        raise _not_called_json(kind)
    return dict(form), True


async def read_with_files(request: Request, limits: Sequence[ModelLimits]) -> tuple[Mapping[str, Any], bool]:
    """Like read_json_or_form, with room for data URLs. limits: those of all models that the request may mean."""
    most = max(max(each.max_image_bytes, each.max_video_bytes) for each in limits)
    return await read_json_or_form(request, max_text_bytes=2 * most)


class _WholeForm(MultiPartParser):
    """Refuses a truncated form; the parser alone would drop its last part."""

    is_whole = False
    spool_max_size = 2**30
    """Files stay in memory, up to the limit of body_limit.py, so that nothing waits for a disk."""

    def __init__(self, headers: Headers, stream: AsyncIterator[bytes], **limits: int) -> None:
        super().__init__(headers, self._until_whole(stream), **limits)

    async def _until_whole(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Yields the stream. Raises an error for a truncated form, on which the parser closes its files."""
        async for piece in stream:
            yield piece
        if not self.is_whole:
            raise MultiPartException("it is cut short: its last boundary is missing")

    def on_end(self) -> None:
        self.is_whole = True


async def _read_multipart(request: Request, kind: str, max_text_bytes: int) -> Mapping[str, Any]:
    _refuse_encoding(request)
    # Decoding as latin-1 accepts all bytes; texts that are not UTF-8 are refused below instead of guessed at.
    headers = Headers({"content-type": f"{kind}; charset=latin-1"})
    parser = _WholeForm(
        headers, request.stream(), max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=max_text_bytes
    )
    try:
        async with _in_time():
            form = await parser.parse()
    except MultiPartException as error:
        raise BadRequest(f"the form cannot be read: {error.message}") from error
    try:
        return await _fields(form)
    finally:
        await form.close()


async def _fields(form: FormData) -> Mapping[str, Any]:
    fields: dict[str, Any] = {}
    try:
        for raw_name, value in form.multi_items():
            name = raw_name.encode("latin-1").decode()
            field = FILES.get(name)
            read: Any = value if isinstance(value, UploadFile) else value.encode("latin-1").decode()
            if isinstance(read, UploadFile) and field is not None:
                read = await read.read()
            if field in SEVERAL:
                fields.setdefault(field, []).append(read)
            else:
                fields[field or name] = read
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"the form is not UTF-8 (0x{error.object[error.start]:02x} in one of its text fields)"
        ) from error
    return fields


async def _text(request: Request) -> str:
    _refuse_encoding(request)
    async with _in_time():
        body = await request.body()
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        how = next((name for start, name in COMPRESSED.items() if body.startswith(start)), None)
        hint = f"; it looks like {how}: no Content-Encoding is accepted, send it uncompressed" if how else ""
        raise BadRequest(
            f"the body is not UTF-8 (byte {error.start}: 0x{error.object[error.start]:02x}){hint}"
        ) from error


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    """Context for reading a body. Raises HTTPException after READ_TIMEOUT_S."""
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {READ_TIMEOUT_S:g} s") from error


def _refuse_encoding(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise BadRequest(f"Content-Encoding: {quoted(encoding)} is not accepted: send the body uncompressed")


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "")


def _not_called_json(kind: str) -> BadRequest:
    """Returns the error for a body that is not declared as JSON: curl declares every body as a form by default."""
    got = quoted(kind) if kind else "no such header"
    return BadRequest(f"send JSON with the header Content-Type: application/json, got {got}")


def _first_sentence(error: Exception) -> str:
    return str(error).partition(";")[0][:200]
