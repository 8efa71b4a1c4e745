"""Reads JSON files, with or without the byte order mark that some editors put at the start."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises ValueError, naming the file, if it is not JSON; OSError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ValueError(f"{path} is not JSON ({where}): fetch it again, or correct it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises the errors of `read_json`, and ValueError for any other JSON value."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not hold a JSON object: fetch it again")
    return settings
