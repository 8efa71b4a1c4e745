"""Results and events of the stages: one frozen dataclass per hop. Torch-free: tensors have type Any.

encoder --> Conditioning --> transformer --> Denoised, and DecodeArguments --> VAE --> Media
                 |               ^
                 +--> VAE --> Prepared        for requests with input images

DecodeArguments are passed on by reference. StreamOptions (request.py) select the events that the caller receives
meanwhile: Progress, and for each partial image a PartialDenoised followed by DecodeArguments. StepsSaved are sent
without being selected, each before a JournalPart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Encodings = tuple[tuple[str, Any], ...]
"""(name of an encoding method, what it returned), in the order of the pipeline's calls. What is returned may be a
nest of tuples, lists and dicts, with tensors and plain values in it."""


@dataclass(frozen=True)
class Encoded:
    """The encode stage's result for one request."""

    encodings: Encodings
    """Tensors are on the CPU."""
    warnings: tuple[str, ...]
    """Warnings of texts that are not read to their end."""


@dataclass(frozen=True)
class Conditioning:
    """The encoder's answer to a request."""

    encodings: Encodings
    """Tensors are on the CPU."""
    encode_ms: float
    warnings: tuple[str, ...] = ()
    """Warnings of texts that are not read to their end."""


Posterior = tuple[Literal["parameters", "latent"], Any, bool]
"""(kind, tensor on the CPU, whether channels-last) of a `vae.encode` result."""
Posteriors = tuple[Posterior, ...]
"""One for each `vae.encode`, in the order of the pipeline's calls."""


@dataclass(frozen=True)
class Prepared:
    """The VAE's answer for a request's input images."""

    posteriors: Posteriors
    prepare_ms: float


NOTHING_PREPARED = Prepared((), 0.0)
"""Answer for requests without input images."""


@dataclass(frozen=True, eq=False)
class DecodeArguments:
    """What the pipeline passes to `vae.decode`: first the unscaled latents, [B, C, H, W] or [B, C, F, H, W]."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_channels_last: bool = False
    """Whether the latents are channels-last in memory, which affects how a VAE's convolutions round."""
    more: tuple["DecodeArguments", ...] = ()
    """Arguments of the later calls, if a video is decoded in several."""
    sound: "DecodeArguments | None" = None
    """What the pipeline passes to `audio_vae.decode`; None: a video without sound, or an image."""

    @classmethod
    def of(cls, latents: Any) -> "DecodeArguments":
        """Returns arguments that are only latents, as most pipelines pass them."""
        return cls((latents,), {})

    @property
    def latents(self) -> Any:
        """The first positional argument."""
        return self.args[0]

    @property
    def calls(self) -> tuple["DecodeArguments", ...]:
        """All calls of `vae.decode`, in their order."""
        return self, *self.more

    @property
    def values(self) -> tuple[Any, ...]:
        """All arguments of all calls, those for the sound included."""
        sound = () if self.sound is None else self.sound.values
        return (*((call.args, call.kwargs) for call in self.calls), *sound)

    @property
    def nbytes(self) -> int:
        return num_bytes(self.values)


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile that another replica decodes for this one: calls of the VAE's decoder, in their order."""

    calls: tuple[tuple[tuple[Any, ...], Mapping[str, Any]], ...]
    """(args, kwargs), on the CPU. A video VAE that decodes frame after frame has one call for each."""
    num_features: int | None
    """Number of entries of the cache that the calls share; None: they share none."""
    is_channels_last: bool


@dataclass(frozen=True)
class Progress:
    """Event: `step` of `num_steps` steps are done, as the request counts them; all in the decode phase."""

    step: int
    num_steps: int
    eta_s: float | None
    """Time left until the last step is done, estimated from this request's own steps; None before the first."""
    phase: Literal["denoise", "decode"] = "denoise"


@dataclass(frozen=True)
class PartialDenoised:
    """Event: the DecodeArguments of partial image `partial_image_index` follow, by reference."""

    partial_image_index: int


@dataclass(frozen=True)
class StepsSaved:
    """Event: `num_steps` steps are done, and the next JournalPart follows, by reference."""

    num_steps: int


@dataclass(frozen=True, eq=False)
class JournalPart:
    """The outputs of a request's denoisers since the previous part. Another replica can resume from all parts."""

    fingerprint: str
    """Identifies the request, the weights and the code: a part with another fingerprint is ignored."""
    number: int
    """Index of the part, from 0."""
    id: str
    after: str | None
    """The id of the previous part: parts that two replicas have written may not all fit together."""
    num_steps: int
    """Number of steps done at the end of the part, as the scheduler counts them."""
    forwards: tuple[tuple[str, Any], ...]
    """(component, what its forward returned, on the CPU), in the order of the pipeline's calls."""

    @property
    def nbytes(self) -> int:
        return num_bytes(self.forwards)


@dataclass(frozen=True)
class ForwardCounts:
    """Number of forwards of its denoisers that a request took."""

    computed: int
    asked: int
    """Forwards that the pipeline called; a step cache extrapolated those that were not computed."""


@dataclass(frozen=True)
class Denoised:
    """Event: a denoise has finished. Its DecodeArguments follow, by reference."""

    encode_ms: float
    prepare_ms: float
    """0 without input images."""
    queue_ms: float
    """Time from arrival at the replica to the start of the denoising loop."""
    denoise_ms: float
    forwards: ForwardCounts
    warnings: tuple[str, ...] = ()
    """The encoder's warnings."""


@dataclass(frozen=True)
class Media:
    """An encoded image or video."""

    data: bytes
    """Empty if the media was written to a target."""
    media_type: str
    decode_ms: float
    num_written: int | None = None
    """Number of bytes written to the target; None: the media is in `data`."""
    thumbnail: bytes | None = None
    """A still of a video that has a target, as WebP; empty if it was written next to the video."""


def num_bytes(value: Any) -> int:
    """Returns the bytes of all tensors in a nest of tuples, lists and dicts, as pipelines pass them."""
    if isinstance(value, Mapping):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(num_bytes, value))
    return int(getattr(value, "nbytes", 0))
