"""The fields of a request's body, from JSON or a form. What cannot be read is refused with the reason."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request

from serve_app.errors import BadRequest, quoted

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\x78\x9c": "deflate", b"\x78\xda": "deflate"}
"""First bytes that no UTF-8 text begins with, and of what (the last two: improbably)."""


async def read_json(request: Request) -> Mapping[str, Any]:
    """Raises BadRequest."""
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


async def read_json_or_form(request: Request) -> tuple[Mapping[str, Any], bool]:
    """The fields, and whether they are texts of a form. Raises BadRequest."""
    kind = _content_type(request)
    if "form" not in kind:
        return await read_json(request), False
    text = await _text(request)
    if "urlencoded" in kind:
        try:
            parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError as error:
            raise BadRequest(f"the form is not UTF-8 or has over 100 fields: {_first_sentence(error)}") from error
    form = await request.form()
    if any(name.startswith("{") for name in form):
        raise _not_called_json(kind)
    return dict(form), True


async def _text(request: Request) -> str:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise BadRequest(f"Content-Encoding: {quoted(encoding)} is not taken: send the body uncompressed")
    body = await request.body()
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        how = next((name for start, name in COMPRESSED.items() if body.startswith(start)), None)
        hint = f"; it looks like {how}: no Content-Encoding is taken, send it uncompressed" if how else ""
        raise BadRequest(
            f"the body is not UTF-8 (byte {error.start}: 0x{error.object[error.start]:02x}){hint}"
        ) from error


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "")


def _not_called_json(kind: str) -> BadRequest:
    """For a body that is not read as JSON: curl calls every body a form unless told otherwise."""
    got = quoted(kind) if kind else "no such header"
    return BadRequest(f"send JSON with the header Content-Type: application/json, got {got}")


def _first_sentence(error: Exception) -> str:
    return str(error).partition(";")[0][:200]
