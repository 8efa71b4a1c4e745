"""`relay serve`: everything that can be known is checked, then Ray and Serve are started, and ended with it."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import describe_errors, without_unknown_keys
from serve_app.config import AppConfig, ConfigError, find_our_applications, parse_app_config, read_serve_file
from serve_app.files import check_files, resolve_family
from serve_app.port import find_port_fault
from serve_app.validation import check_defaults

SERVER = "serve_app.server"
SERVE_SCHEMA = "ray.serve.schema"
"""Both import Ray, so they are looked up only once the config is read."""
LOCAL = "local"


def serve_command(
    config: Annotated[Path, typer.Argument(help="Serve YAML, such as configs/quickstart.yaml")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="instead of http_options.port")] = None,
    host: Annotated[str | None, typer.Option(help="instead of http_options.host; 0.0.0.0: all addresses")] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="seconds that running requests get when it is told to end")
    ] = 5.0,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="of a running Ray cluster to serve on; local: start one")
    ] = LOCAL,
) -> None:
    """Serve a config on this machine until Ctrl-C: mistakes are told before anything starts."""
    sys.path.insert(0, "")  # other applications' import paths are looked up from here, as by `serve run`
    is_local = address == LOCAL
    raw, apps = read_checked(config, is_local=is_local)
    options = raw.get("http_options") or {}
    given = {"host": host, "port": port}
    raw["http_options"] = options | {name: value for name, value in given.items() if value is not None}
    schema = importlib.import_module(SERVE_SCHEMA).ServeDeploySchema
    deployment = validate_schema(config, schema, raw)
    if is_local:
        fault = find_port_fault(deployment.http_options.host, deployment.http_options.port)
        if fault is not None:
            raise ConfigError(fault)
    names = {name: app.model.name for name, app in apps.items()}
    code = importlib.import_module(SERVER).run_server(deployment, names, address=address, grace_s=grace)
    raise typer.Exit(code)


def read_checked(path: Path, *, is_local: bool) -> tuple[dict[str, Any], dict[str, AppConfig]]:
    """The YAML, and the configs of those of its applications that serve a checkpoint, by name.

    is_local: this machine will serve, so files must be here. Raises ConfigError: all mistakes, a line each.
    """
    raw = read_serve_file(path)
    ours = find_our_applications(path, raw)
    apps, mistakes = {}, []
    for application in ours:
        name = str(application.get("name", "default"))
        source = str(path) if len(ours) == 1 else f"{path}, application {name}"
        try:
            apps[name] = _check_app(application.get("args") or {}, source, is_local=is_local)
        except ConfigError as error:
            mistakes += str(error).splitlines()
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return raw, apps


def _check_app(args: Any, source: str, *, is_local: bool) -> AppConfig:
    app = parse_app_config(args, source=source)
    try:
        app = resolve_family(app)
        check_defaults(app.model, app.limits)
        if is_local:
            check_files(app)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in str(error).splitlines())) from error
    return app


def validate_schema(path: Path, schema: Any, raw: dict[str, Any]) -> Any:
    """Ray's own `ServeDeploySchema` of the YAML; it takes unknown keys for those of a newer Ray, and we do not.

    Raises ConfigError.
    """
    known, lines = without_unknown_keys(schema, raw)
    try:
        deployment = schema.model_validate(known)
    except ValueError as error:  # pydantic's
        lines += describe_errors(error).splitlines()  # type: ignore[arg-type]
    if lines:
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines))
    return deployment
