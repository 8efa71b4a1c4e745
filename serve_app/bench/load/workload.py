"""The requests of a run, and their times: mixes of sizes and steps, random arrivals, or a trace."""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.config.app import ConfigError

Value = TypeVar("Value")
Mix = Sequence[tuple[Value, float]]
"""Values with their weights."""

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white")
THINGS = ("circle", "square", "triangle", "lighthouse", "fox", "bicycle", "teapot")
PLACES = ("on the left", "on the right", "at the top", "in the middle", "at dusk", "in the snow")


class WorkloadFault(ConfigError):
    """A mix, a trace or a load option cannot be read."""


class Ask(BaseModel):
    """One request. Each line of a trace file is one, with `at_s`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1)
    size: str | None = Field(default=None, pattern=r"^(\d+x\d+|auto)$", description="None: the server's default")
    steps: int | None = Field(default=None, ge=1, description="None: the server's default, as OpenAI has no field")
    n: int = Field(default=1, ge=1)
    at_s: float | None = Field(
        default=None, ge=0, description="seconds since the start; None: when a client is free"
    )

    @property
    def kind(self) -> str:
        """The properties that the request's time alone on the server depends on, as a label."""
        steps = "" if self.steps is None else f", {self.steps} steps"
        return (self.size or "default size") + steps + (f", n {self.n}" if self.n > 1 else "")


def plan_asks(
    num_prompts: int, sizes: Mix[str | None], steps: Mix[int | None], *, n: int, prompts: Sequence[str], seed: int
) -> list[Ask]:
    """Returns requests, the same for the same seed.

    Without `prompts`, every prompt is new to the server, so that its caches do not help.
    """
    rng = random.Random(seed)
    texts = itertools.cycle(prompts) if prompts else invent_prompts(rng)
    return [
        Ask(prompt=next(texts), size=_draw(sizes, rng), steps=_draw(steps, rng), n=n) for _ in range(num_prompts)
    ]


def invent_prompts(rng: random.Random) -> Iterator[str]:
    """Yields prompts, no two of them alike."""
    for number in itertools.count(rng.randrange(10**6)):
        yield f"a {rng.choice(COLOURS)} {rng.choice(THINGS)} {rng.choice(PLACES)}, number {number}"


def with_arrivals(asks: Sequence[Ask], rate: float, burstiness: float, seed: int) -> list[Ask]:
    """Returns the asks with arrival times, `rate` a second on average; the gaps are gamma-distributed.

    burstiness: the distribution's shape. 1: a Poisson process; less: bursts.
    """
    rng, at_s, timed = random.Random(seed + 1), 0.0, []
    for ask in asks:
        at_s += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        timed.append(ask.model_copy(update={"at_s": at_s}))
    return timed


def read_trace(file: Path) -> list[Ask]:
    """Reads a file of JSON lines; returns them in order of `at_s`. Raises WorkloadFault, which names the line."""
    asks = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            ask = Ask.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise WorkloadFault(f"{file}, line {number}: {where or 'the line'}: {first['msg']}") from error
        if ask.at_s is None:
            raise WorkloadFault(f"{file}, line {number}: at_s is missing: give the seconds since the start")
        asks.append(ask)
    if not asks:
        raise WorkloadFault(f"{file} has no requests: each line must be a JSON object with at_s and prompt")
    return sorted(asks, key=lambda ask: ask.at_s or 0.0)


def read_mix(text: str, what: str) -> list[tuple[str, float]]:
    """Reads a mix such as `512x512:3,768x768:1`; a missing weight is 1. Raises WorkloadFault."""
    mix = []
    for part in text.split(","):
        value, _, weight = part.strip().partition(":")
        try:
            mix.append((value, float(weight or 1)))
        except ValueError:
            raise WorkloadFault(f"{what} {part!r}: the weight after the colon must be a number") from None
        if not value or not mix[-1][1] > 0:
            raise WorkloadFault(f"{what} {part!r}: give VALUE or VALUE:WEIGHT, with a weight above 0")
    return mix


def _draw(mix: Mix[Value], rng: random.Random) -> Value:
    return rng.choices([value for value, _ in mix], [weight for _, weight in mix])[0]
