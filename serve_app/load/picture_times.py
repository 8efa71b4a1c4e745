"""Estimates how long one model's images take, from those before them. Pure: the caller passes the time."""

from collections import OrderedDict
from dataclasses import dataclass

from deployments.request import GenerationRequest, MediaSize

NEW_WEIGHT = 0.2
"""Weight of the latest image in the average of its size."""
LATE_WEIGHT = 0.5
"""Weight of an image that missed its deadline: all requests admitted meanwhile would miss theirs too."""
SEVERAL = 2.0
FORGET_S = 60.0
"""Older measurements refuse no request: the next request of that size is admitted and measured again."""
MAX_SIZES = 256
MIN_WORK_S = 1e-6


@dataclass
class Measured:
    """Average times of images of one size: elapsed seconds divided by the number of images that shared them."""

    step_s: float
    rest_s: float
    """Everything but the steps."""
    seen_s: float

    def work_s(self, num_steps: int) -> float:
        return max(self.rest_s + num_steps * self.step_s, MIN_WORK_S)

    def follow(self, other: "Measured", share: float = NEW_WEIGHT) -> None:
        self.step_s += share * (other.step_s - self.step_s)
        self.rest_s += share * (other.rest_s - self.rest_s)
        self.seen_s = other.seen_s


class PictureTimes:
    """Measured times by size, the most recently updated last."""

    def __init__(self) -> None:
        self._by_size: OrderedDict[MediaSize, Measured] = OrderedDict()

    def note(
        self, request: GenerationRequest, *, took_s: float, denoise_s: float, num_sharing: float, now: float
    ) -> None:
        """Records a finished image.

        took_s: since it was admitted, without the time it waited for a sleeping model.
        num_sharing: average number of images in progress meanwhile, including this one.
        """
        denoise_s = min(denoise_s, took_s)
        shared = max(1.0, num_sharing)
        step_s = denoise_s / request.num_inference_steps / shared
        measured = Measured(step_s, (took_s - denoise_s) / shared, now)
        known = self._by_size.setdefault(request.size, measured)
        known.follow(measured)
        self._by_size.move_to_end(request.size)
        if len(self._by_size) > MAX_SIZES:
            self._by_size.popitem(last=False)

    def note_undone(self, request: GenerationRequest, for_s: float, *, num_sharing: float, now: float) -> None:
        """Records that an image was given up after this time, so that it takes longer.

        Otherwise, if all requests missed their deadlines, nothing would be measured and none refused. Ignores an
        image that ran alone, because a cold start or a lost stage may have delayed it.
        """
        if num_sharing < SEVERAL:
            return
        at_least_s, known = for_s / num_sharing, self._by_size.get(request.size)
        if known is None:
            self._by_size[request.size] = Measured(at_least_s / request.num_inference_steps, 0.0, now)
        elif (late := at_least_s / known.work_s(request.num_inference_steps)) > 1:
            known.follow(Measured(late * known.step_s, late * known.rest_s, now), LATE_WEIGHT)

    def known_s(self, request: GenerationRequest, now: float) -> float | None:
        """Returns the seconds that the request takes of the stages that serve it; None if its size was not
        measured recently."""
        known = self._by_size.get(request.size)
        if known is None or known.seen_s < now - FORGET_S:
            return None
        return known.work_s(request.num_inference_steps)

    def guess_s(self, request: GenerationRequest) -> float:
        """Like `known_s` for any size: scaled from the nearest measured size, and 0 if nothing has been
        measured."""
        if not self._by_size:
            return 0.0
        size = request.size
        nearest = size if size in self._by_size else min(self._by_size, key=lambda other: _ratio(other, size))
        return self._by_size[nearest].work_s(request.num_inference_steps) * _area(size) / _area(nearest)


def _area(size: MediaSize) -> int:
    return size.width * size.height * size.num_frames


def _ratio(a: MediaSize, b: MediaSize) -> float:
    return max(_area(a) / _area(b), _area(b) / _area(a))
