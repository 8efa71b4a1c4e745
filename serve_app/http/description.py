"""The API's OpenAPI description: exactly what this app's models accept, as far as a schema can express it.

A schema cannot express products: a size is described up to sides whose square the model still accepts, although
longer sides with no more pixels are accepted too; likewise seconds times fps.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from deployments.request import CallKind
from serve_app.http.openai_answers import (
    CompletedEvent,
    EditCompletedEvent,
    EditPartialImageEvent,
    EditProgressEvent,
    ErrorResponse,
    PartialImageEvent,
    ProgressEvent,
)
from serve_app.http.openai_requests import GenerationBody
from serve_app.models.card import CallCard, ModelCard

Schema = dict[str, Any]
REF = "#/components/schemas/{model}"


def _event(model: str) -> Schema:
    """Returns the schema of one server-sent event, as OpenAPI 3.2 describes them."""
    return {
        "type": "object",
        "properties": {
            "event": {"type": "string", "description": "the `type` in data; for an error, `error`"},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"$ref": REF.format(model=model)},
            },
        },
        "required": ["event", "data"],
    }


EVENT, EDIT_EVENT = _event("ImageStreamEvent"), _event("ImageEditStreamEvent")
FILE: Schema = {"type": "string", "contentMediaType": "application/octet-stream"}
"""A file in a form, as described by OpenAPI 3.1 and later."""
MAX_FPS = 120
_STRENGTH: Schema = {
    "anyOf": [{"required": ["input_reference"]}, {"properties": {"strength": {"type": "null"}}}],
}
"""Strength of a video needs an input video."""


def describe_body(
    api: FastAPI, path: str, kind: type[GenerationBody], models: Sequence[ModelCard], *media_types: str
) -> None:
    """Describes a request body. Must run after FastAPI's own description, which would make floats of large
    integers.

    models: those served at this path; the first is the default.
    """
    content = {}
    for media in media_types:
        is_form = "form" in media
        schemas = [_body_schema(kind, model, path, is_form=is_form) for model in models]
        names = [model.id for model in models]
        described = schemas[0] if len(schemas) == 1 else _one_of(schemas, names, is_form=is_form)
        content[media] = {"schema": described}
    api.openapi()["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}


def _one_of(schemas: Sequence[Schema], names: Sequence[str], *, is_form: bool) -> Schema:
    """Returns the schemas of all models, distinguished by `model`, which may be left out for the first."""
    for i, (schema, name) in enumerate(zip(schemas, names, strict=True)):
        field: Schema = {"type": "string", "enum": [name], "title": "Model"}
        schema["title"] += f" for {name}"
        schema["properties"]["model"] = field if i or is_form else _with_null(field)
        schema["required"] += ["model"] if i else []
    return {"oneOf": [*schemas]}


def _inlined(schema: Any, definitions: Mapping[str, Schema]) -> Any:
    """Replaces references to `#/$defs` by their definitions: within OpenAPI `#` is the whole document, which has
    no `$defs`."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    own = {name: _inlined(each, definitions) for name, each in schema.items() if name != "$ref"}
    referred = schema.get("$ref")
    return own if referred is None else _inlined(definitions[referred.removeprefix("#/$defs/")], definitions) | own


def _body_schema(kind: type[GenerationBody], model: ModelCard, path: str, *, is_form: bool) -> Schema:
    """Returns the schema of a body: that of the class, narrowed to the model's limits. A form has no nulls."""
    calls = {kind: call for kind, call in model.calls.items() if call.path in (path, f"{path}/sync")}
    whole = kind.model_json_schema()
    schema: Schema = _inlined(whole, whole.pop("$defs", {}))
    fields, limits = schema["properties"], model.limits
    for name in ("guidance_scale", "true_cfg_scale", "strength"):
        if name in fields and all(getattr(call.defaults, name) is None for call in calls.values()):
            del fields[name]
    if not any(call.takes_guidance_scale_2 for call in calls.values()):
        fields.pop("guidance_scale_2", None)
    _describe_pictures(schema, calls, is_form=is_form)
    fields["prompt"] |= {"maxLength": limits.max_prompt_characters, "pattern": r"\S"}
    _narrow(fields["negative_prompt"], maxLength=limits.max_prompt_characters)
    _narrow(fields["num_inference_steps"], maximum=limits.max_num_inference_steps)
    _narrow(fields["scheduler"], enum=list(model.schedulers))
    if not model.prompt_weighting:
        _narrow(fields["prompt_weighting"], enum=[False])
    fields["model"] |= {"examples": [model.id]}
    sizes = "|".join(("auto", *limits.sizes))
    fields["size"]["pattern"] = f"^({sizes})$" if limits.sizes else _sizes(limits.size_multiple, limits.max_pixels)
    if "num_frames" in fields:
        stride, most = limits.frame_stride, limits.max_num_frames
        _narrow(fields["num_frames"], enum=list(range(1, most + 1, stride)))
        schema["allOf"] = [_seconds((most - 1) // stride * stride, model.defaults.fps or 1)]
        if "strength" in fields:
            schema["allOf"].append(_STRENGTH)
    else:
        schema["allOf"] = [
            _either({"stream": [True]}, {"partial_images": [0, None], "progress": [False, None]}),
            _either({"output_format": ["jpeg", "webp"]}, {"output_compression": [100, None]}),
            {
                "not": {
                    "properties": {"stream": {"const": True}, "background": {"const": True}},
                    "required": ["stream", "background"],
                }
            },
        ]
    for name in fields.keys() - set(schema["required"]):
        fields[name] = _without_null(fields[name]) if is_form else _with_null(fields[name])
    return schema


def _describe_pictures(schema: Schema, calls: Mapping[CallKind, CallCard], *, is_form: bool) -> None:
    """Describes which input images and videos are allowed and which are required."""
    fields = schema["properties"]
    needed: dict[str, set[CallKind]] = {
        "mask": {"inpaint"},
        "input_reference": {"image_to_video", "video_to_video"},
    }
    for name, kinds in needed.items():
        if name not in fields:
            continue
        if kinds.isdisjoint(calls):
            del fields[name]
            continue
        if is_form:
            fields[name] |= {"anyOf": [FILE, {"type": "null"}]}
        if kinds >= calls.keys():
            fields[name] = _without_null(fields[name])
            schema["required"].append(name)
    if "image" not in fields:
        return
    if not any(call.needs_control for call in calls.values()):
        del fields["control_image"], fields["control_scale"]
        schema["required"].append("image")
    else:
        fields["control_image"] = _without_null(fields["control_image"]) | ({"anyOf": [FILE]} if is_form else {})
        schema["required"].append("control_image")
    most = max(call.max_images for call in calls.values())
    one, several = (FILE, {"type": "array", "items": FILE, "minItems": 1}) if is_form else fields["image"]["anyOf"]
    fields["image"]["anyOf"] = [one, several | {"maxItems": most}]


def _narrow(field: Schema, **more: Any) -> None:
    """Narrows the non-null branch of an optional field."""
    field["anyOf"][0] |= more


def _with_null(field: Schema) -> Schema:
    """Allows null, which stands for a field left out."""
    return field if "anyOf" in field else {"anyOf": [field, {"type": "null"}]} | _about(field)


def _without_null(field: Schema) -> Schema:
    return field["anyOf"][0] | _about(field) if "anyOf" in field else field


def _about(field: Schema) -> Schema:
    return {
        key: field[key] for key in ("title", "description", "default", "examples") if field.get(key) is not None
    }


def _either(needed: dict[str, list[Any]], without: dict[str, list[Any]]) -> Schema:
    """Returns a schema that needs the first fields, or else allows the second ones only these values."""
    return {
        "anyOf": [
            {"properties": {name: {"enum": values} for name, values in needed.items()}, "required": [*needed]},
            {"properties": {name: {"enum": values} for name, values in without.items()}},
        ]
    }


def _seconds(num_frames: int, default_fps: int) -> Schema:
    """Returns a schema that bounds the frames of `seconds`; `num_frames` takes precedence over it."""
    return {
        "anyOf": [
            {"required": ["num_frames"], "properties": {"num_frames": {"type": "integer"}}},
            {"properties": {"fps": {"enum": [default_fps, None]}, "seconds": _at_most(num_frames / default_fps)}},
            {"properties": {"seconds": _at_most(num_frames / MAX_FPS)}},
        ]
    }


def _at_most(seconds: float) -> Schema:
    return {"anyOf": [{"type": "number", "maximum": seconds}, {"type": "null"}]}


def _sizes(multiple: int, max_pixels: int) -> str:
    sides = "|".join(str(side) for side in range(multiple, math.isqrt(max_pixels) + 1, multiple))
    return f"^(auto|({sides})x({sides}))$"


def describe_events(api: FastAPI) -> None:
    """Adds schemas of the events: FastAPI describes only whole answers."""
    kinds: dict[str, TypeAdapter[Any]] = {
        "ImageStreamEvent": TypeAdapter(ProgressEvent | PartialImageEvent | CompletedEvent | ErrorResponse),
        "ImageEditStreamEvent": TypeAdapter(
            EditProgressEvent | EditPartialImageEvent | EditCompletedEvent | ErrorResponse
        ),
    }
    schemas = api.openapi()["components"]["schemas"]
    for name, adapter in kinds.items():
        schema = adapter.json_schema(mode="serialization", ref_template=REF)
        schemas |= schema.pop("$defs")
        schemas[name] = schema


def drop_422(api: FastAPI) -> None:
    """Removes the 422 that FastAPI documents for every parameter; invalid input is answered with 400 or 404
    here."""
    for path in api.openapi()["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
