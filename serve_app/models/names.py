"""Finds the served model that a name means."""

from collections.abc import Iterable

from serve_app.errors import UnknownModel, quoted


def find_name(name: str, served: Iterable[str]) -> str:
    """Returns the longest served name that matches. Raises UnknownModel.

    A served name may be followed by a colon and an adapter's name, which the model checks itself.
    """
    names = list(served)
    meant = [known for known in names if name == known or name.startswith(f"{known}:")]
    if not meant:
        raise UnknownModel(f"model {quoted(name)} is not served here; served: {', '.join(map(repr, names))}")
    return max(meant, key=len)
