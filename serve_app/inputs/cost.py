"""The cost of a request in megapixel-steps, and what to lower if it is above the limit."""

from collections.abc import Iterator, Sequence

from deployments.request import GenerationRequest
from serve_app.errors import BadRequest


def total_cost(requests: Sequence[GenerationRequest]) -> float:
    """Returns the cost of all images of one request, in megapixel-steps."""
    return sum(each.megapixel_steps for each in requests)


def check_cost(requests: Sequence[GenerationRequest], limit: float | None, whose: str) -> None:
    """Raises BadRequest, naming the first field that alone can be lowered enough, if the requests cost too much.

    requests: one for each output image, equal but for their seeds.
    whose: name of the limit, for the message.
    """
    cost = total_cost(requests)
    if limit is None or cost <= limit:
        return
    first, num = requests[0], len(requests)
    param, enough = next(_lower(first, num, limit))
    asked = f"{f'{num} x ' if num > 1 else ''}{first.size} in {first.num_inference_steps} steps"
    raise BadRequest(
        f"{param}: {asked} costs {cost:g} megapixel-steps; the limit ({whose}) is {limit:g}: ask for {enough}",
        param,
    )


def _lower(request: GenerationRequest, num: int, limit: float) -> Iterator[tuple[str, str]]:
    """Yields the fields that alone can be lowered enough, and to which value."""
    share = limit / (num * request.megapixel_steps)
    pixels = f"{int(request.width * request.height * share)} pixels or less"
    for param, now in (
        ("n", num),
        ("num_frames", request.num_frames),
        ("num_inference_steps", request.num_inference_steps),
    ):
        if now > 1 and int(now * share) >= 1:
            yield param, f"{int(now * share)} or less"
    yield "size", pixels
