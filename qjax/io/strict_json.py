"""JSON objects from files that nobody vouches for."""

from __future__ import annotations

import collections
import json
from typing import Any

_MAX_DIGITS = 100  # of an integer; some configurations say 10**30 for no limit


def read_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
      raw: the bytes of a file, or of a part of it.
      where: the file, and the part, for errors.

    Raises:
      ValueError: naming `where`, if it is not UTF-8, not JSON, no object, nested too deeply, has a
        key twice, or an integer of more than 100 digits.

    Example:
      >>> read_object(b'{"a": 1, "a": 2}', "model.json")
      Traceback (most recent call last):
      ValueError: model.json: the key 'a' appears twice
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{where}: the key {twice[:80]!r} appears twice")
        return keys

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(f"{where}: holds an integer of {len(digits)} digits")
        return int(digits)

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_int=integer)
    except UnicodeDecodeError as error:
        why = f"is not UTF-8 ({error.reason} at byte {error.start})"
        raise ValueError(f"{where}: {why}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is a JSON {type(value).__name__}, must be an object")
    return value


def is_count(value: Any) -> bool:
    """Whether it is an integer of at least 1, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
