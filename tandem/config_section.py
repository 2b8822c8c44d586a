"""Tables of a configuration file to dataclasses: every key known, every value of its type.

Must not know which sections there are, or read files.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from enum import StrEnum
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from tandem.errors import ConfigError

T = TypeVar("T")


def read_section(kind: type[T], values: Mapping[str, Any], where: str, *, hidden: Collection[str] = ()) -> T:
    """A dataclass from a table; `hidden` fields and those that begin with _ are no keys.

    Raises ConfigError naming a key that is unknown, with the nearest valid one and all of them, or of the wrong type.
    """
    hints = {key: hint for key, hint in get_type_hints(kind).items() if not key.startswith("_") and key not in hidden}
    for key, value in values.items():
        if key not in hints:
            near = get_close_matches(key, hints, n=1, cutoff=0.0)
            raise ConfigError(f"{where}unknown key {key!r}; the nearest valid one is {near[0]!r}, and all are {', '.join(hints)}")
        if not _fits(value, hints[key]):
            raise ConfigError(f"{where}{key} must be {_said(hints[key])}, got {value!r}")
    return kind(**{key: _converted(value, hints[key]) for key, value in values.items()})


def _converted(value: object, hint: Any) -> object:
    return hint(value) if hint is float or _is_choice(hint) else value


def _is_choice(hint: Any) -> bool:
    return isinstance(hint, type) and get_origin(hint) is None and issubclass(hint, StrEnum)


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if _is_choice(hint):
        return value in [*hint]
    return isinstance(value, get_origin(hint) or hint)


def _said(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(_said(part) for part in get_args(hint) if part is not type(None))
    if _is_choice(hint):
        return " or ".join(hint)
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, "a table")
