"""Measures how a key with 50 times the requests slows down another key of the same server, over HTTP.

First the small key's client is alone and sends one request after another. Then it sends the same requests while 50
clients of the large key keep the server full. A rejected client retries after the time in Retry-After.
"""

import asyncio
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve_app.auth.keys import KeyLimits, new_key, write_keys
from serve_app.bench.load.figures import percentile
from serve_app.bench.report import report
from serve_app.bench.serving import serving
from serve_app.config.serve_file import read_serve_file

PATH = "/v1/images/generations"
CROWD = 50
"""Clients of the large key, each with as many requests as the small key's one client has."""


STAGES = ("encode", "queue", "denoise", "decode")


@dataclass
class Client:
    """A client of one key, and the latency of each of its images from the first attempt on."""

    http: httpx.AsyncClient
    secret: str
    latencies_s: list[float] = field(default_factory=list)
    stages_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Times of each image in `timings_ms`, by stage."""
    num_refused: int = 0

    async def draw(self, **fields: Any) -> None:
        """Requests one image until it is accepted. Raises httpx.HTTPStatusError for an error of another kind."""
        began = time.perf_counter()
        body = {"prompt": "a red circle"} | fields
        while True:
            answer = await self.http.post(PATH, json=body, headers={"Authorization": f"Bearer {self.secret}"})
            if answer.status_code not in (429, 503):
                break
            self.num_refused += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]))
        answer.raise_for_status()
        self.latencies_s.append(time.perf_counter() - began)
        for stage, took_ms in answer.json()["data"][0]["timings_ms"].items():
            self.stages_ms[stage].append(took_ms)

    def summary(self) -> dict[str, Any]:
        return {
            "requests": len(self.latencies_s),
            "refused": self.num_refused,
            "p50_s": statistics.median(self.latencies_s),
            "p95_s": percentile(self.latencies_s, 95),
        } | {f"{stage}_p95_ms": percentile(self.stages_ms[stage], 95) for stage in STAGES}


def run(config_file: Path, *, port: int, num_steps: int, num_requests: int, json_file: Path | None) -> None:
    """Reports a row for each `client`: the small key's, "alone" and "beside" the crowd, and the "crowd".

    requests: answered ones. refused: 429s and 503s. p50_s, p95_s: from the first attempt on. over_alone: p95_s
    over that of "alone". encode, queue, denoise, decode_p95_ms: from `timings_ms`.
    """
    document = read_serve_file(config_file)
    (small, of_small), (large, of_large) = (new_key(name, KeyLimits()) for name in ("small", "large"))
    with tempfile.TemporaryDirectory() as folder:
        keys_file, served_file = Path(folder) / "keys.yaml", Path(folder) / config_file.with_suffix(".yaml").name
        write_keys(keys_file, (of_small, of_large))
        document["applications"][0]["args"]["auth"] = {"keys_file": str(keys_file)}
        served_file.write_text(yaml.safe_dump(document))
        with serving(served_file, port):
            clients = asyncio.run(_measure(f"http://127.0.0.1:{port}", small, large, num_steps, num_requests))
    rows = [{"client": name} | client.summary() for name, client in clients.items()]
    for row in rows:
        row["over_alone"] = row["p95_s"] / rows[0]["p95_s"]
    report(f"a key beside one with {CROWD} x its requests, {config_file.stem}", rows, json_file)


async def _measure(url: str, small: str, large: str, num_steps: int, num_requests: int) -> dict[str, Client]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        await _one_by_one(Client(http, small), range(4), num_steps)  # warm-up
        alone, beside, crowd = Client(http, small), Client(http, small), Client(http, large)
        seeds = range(num_requests)
        await _one_by_one(alone, seeds, num_steps)
        crowded = [asyncio.create_task(_one_by_one(crowd, seeds, num_steps)) for _ in range(CROWD)]
        await asyncio.sleep(5 * percentile(alone.latencies_s, 95))  # until the server is full
        await _one_by_one(beside, seeds, num_steps)
        was_crowded = not all(task.done() for task in crowded)
        for task in crowded:
            task.cancel()
        await asyncio.gather(*crowded, return_exceptions=True)
    assert was_crowded, "the large key ran out of requests before the small key's were done"
    return {"alone": alone, "beside": beside, "crowd": crowd}


async def _one_by_one(client: Client, seeds: Sequence[int], num_steps: int) -> None:
    for seed in seeds:
        await client.draw(seed=seed, num_inference_steps=num_steps)
