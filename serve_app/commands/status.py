"""`relay status`: shows `GET /v1/status` as tables, once or live."""

import time
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any

import httpx
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

Json = Mapping[str, Any]

COLUMNS = ("stage", "replicas", "active", "waiting", "work", "weights", "peak")
RUNNING, HEALTHY = "RUNNING", "HEALTHY"
LATE_S = 2.5
"""Age above which the stages' answers are marked as old; in normal operation they are younger."""


class NoStatus(ConnectionError):
    """The server cannot be reached, or refuses to tell its status."""


def fetch_status(url: str, api_key: str | None = None) -> Json:
    """Fetches the status of the server at `url`, from which `http://` may be left out. Raises NoStatus."""
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        asks_proxy = not is_loopback(url)  # a proxy cannot reach this machine's loopback
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        answer = httpx.get(f"{url}/v1/status", headers=headers, timeout=30, trust_env=asks_proxy)
    except httpx.InvalidURL as error:
        raise NoStatus(f"{url} is not a valid URL: {error}") from error
    except httpx.TransportError as error:
        raise NoStatus(f"{url} does not answer: {error}") from error
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise NoStatus(f"{url} requires a key: set RELAY_API_KEY to a valid one")
    if answer.status_code != httpx.codes.OK:
        raise NoStatus(f"{url}/v1/status answers {answer.status_code}: {answer.text[:300]}")
    try:
        status: Json = answer.json()
    except ValueError as error:
        raise NoStatus(f"{url}/v1/status answers with something other than JSON: {answer.text[:300]}") from error
    return status


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine's loopback interface."""
    host = httpx.URL(url).host
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


def watch_status(url: str, console: Console, api_key: str | None = None, *, every_s: float = 1.0) -> None:
    """Shows the status until interrupted. If the server is away for a while, goes on asking."""
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(_now(url, api_key), refresh=True)
                time.sleep(every_s)
        except KeyboardInterrupt:
            pass


def _now(url: str, api_key: str | None) -> RenderableType:
    try:
        return render_status(fetch_status(url, api_key))
    except NoStatus as error:
        return Text(str(error), style="red")


def render_status(status: Json) -> RenderableType:
    """Returns one table per model."""
    if "models" not in status:
        return status_table(status)
    owners: dict[str, str] = {}
    tables = [status_table(of, owners) for of in status["models"].values()]
    return Group(f"{status['num_in_progress']} requests in progress", *tables)


def status_table(status: Json, owners: dict[str, str] | None = None) -> Table:
    """Returns a table with one row per process of every stage. At 80 columns, no word of it is broken.

    owners: by deployment, the model in whose table it is shown already; this function adds to it.
    """
    owners = {} if owners is None else owners
    table = Table(
        *(Column(name, no_wrap=name in {"stage", "active", "waiting", "weights", "peak"}) for name in COLUMNS),
        box=box.MINIMAL_HEAVY_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"{status['model']}: {status['num_in_progress']} requests in progress{_age(status['age_s'])}",
        title_justify="left",
        title_style="bold",
    )
    for name, rows_of in (("encoder", _encoder), ("transformer", _transformer), ("vae", _vae)):
        stage = status[name]
        owner = owners.setdefault(stage.get("deployment", name), status["model"])
        if owner != status["model"]:
            table.add_row(name, f"shared with {owner}", *("",) * 5)
            continue
        head = (name, _count(stage["num_replicas"], stage["state"]))
        rows = [row for replica in stage["replicas"] for row in rows_of(replica)] or [("",) * 5]
        for i, row in enumerate(rows):
            table.add_row(*(head if i == 0 else ("", "")), *row)
        if stage["message"]:
            table.add_row("", "", "", "", Text(stage["message"], style="yellow"))
    return table


def _age(age_s: float) -> str:
    """Returns how old the stages' answers are, or "" unless they are older than LATE_S."""
    return f"; the stages reported {age_s:.0f} s ago" if age_s > LATE_S else ""


def _count(num_replicas: Mapping[str, int], state: str) -> str:
    """Returns `1`, or `1, 1 starting`, or `asleep` without replicas; plus the stage's state if not healthy."""
    others = [f"{number} {other.lower()}" for other, number in num_replicas.items() if other != RUNNING]
    running = num_replicas.get(RUNNING, 0)
    count = ", ".join([str(running), *others]) if running or others else "asleep"
    return count if state == HEALTHY else f"{count}, {state}"


def _encoder(stats: Json) -> Iterator[tuple[str, ...]]:
    work = f"{stats['num_forwards']} prompts, {stats['num_cache_hits']} cached"
    yield str(stats["num_in_flight"]), "", work, *_memory(stats["memory"])


def _transformer(stats: Json) -> Iterator[tuple[str, ...]]:
    queue = stats["queue"]
    for rank in stats["ranks"]:
        blocks = dict.fromkeys(f"{first}-{end - 1}" for first, end in rank["blocks"].values())
        work = f"{rank['num_micro_batches']} batches, blocks {', '.join(blocks)}"
        if stats["occupied_s"]:
            work += f", bubble {max(0.0, 1 - rank['compute_s'] / stats['occupied_s']):.0%}"
        queued = (str(queue["num_seats"]), str(queue["num_waiting"])) if rank["rank"] == 0 else ("", "")
        yield *queued, work, *_memory(rank["memory"])


def _vae(stats: Json) -> Iterator[tuple[str, ...]]:
    yield str(stats["num_in_flight"]), "", f"{stats['num_decoded']} decoded", *_memory(stats["memory"])


def _memory(memory: Json) -> tuple[str, str]:
    limit = "" if memory["limit_bytes"] is None else f" of {_gib(memory['limit_bytes'])}"
    return _gib(sum(memory["weights_bytes"].values())), _gib(memory["peak_reserved_bytes"]) + limit


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
