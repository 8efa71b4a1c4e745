"""Which of the served models a name means."""

from collections.abc import Iterable

from serve_app.errors import UnknownModel, quoted


def find_name(name: str, served: Iterable[str]) -> str:
    """The served name, the longest that fits. Raises UnknownModel.

    What follows a colon behind a served name is for that model to judge.
    """
    names = list(served)
    meant = [known for known in names if name == known or name.startswith(f"{known}:")]
    if not meant:
        raise UnknownModel(f"model {quoted(name)} is not served here; served: {', '.join(map(repr, names))}")
    return max(meant, key=len)
