"""JSON as people's editors leave it: a byte order mark at its head is no part of it."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Raises ValueError, naming the file, where it is not JSON; OSError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ValueError(f"{path} is not JSON ({where}): fetch it again, or mend it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object. Raises as `read_json`, and ValueError for any other JSON."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings (a JSON object): fetch it again")
    return settings
