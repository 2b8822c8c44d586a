"""Tables of a configuration file to dataclasses: every key known, every value of its type.

Must not know which sections there are, or read files.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from tandem.errors import ConfigError

T = TypeVar("T")


def read_section(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from a table; raises ConfigError naming a key that is unknown, with the nearest valid one, or of the wrong type."""
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            near = get_close_matches(key, hints, n=1, cutoff=0.0)
            raise ConfigError(f"{where}unknown key {key!r}; the nearest valid one is {near[0]!r}")
        if not _fits(value, hints[key]):
            raise ConfigError(f"{where}{key} must be {_said(hints[key])}, got {value!r}")
    return kind(**{key: float(value) if hints[key] is float else value for key, value in values.items()})


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _said(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(_said(part) for part in get_args(hint) if part is not type(None))
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, "a table")
