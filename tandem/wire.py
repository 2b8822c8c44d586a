"""Fields between messages and dataclasses: names that both have are copied, and what does not fit is named.

Must not know any message by name: `convert.py` does. Absent fields keep the dataclass's default.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from tandem.errors import InvalidRequestError

M = TypeVar("M", bound=Message)
T = TypeVar("T")


def build(message_type: type[M], path: str, **fields: object) -> M:
    """The message with these fields; None leaves one absent.

    Raises InvalidRequestError naming `path.field` where a value has the wrong type, is out of range or is not valid UTF-8.
    """
    make: Callable[..., M] = message_type
    try:
        return make(**fields)
    except (TypeError, ValueError, OverflowError) as error:
        for name, value in fields.items():
            _try_field(make, f"{path}.{name}" if path else name, name, value)
        raise InvalidRequestError(path, f"does not fit the message ({error})") from error


def _try_field(make: Callable[..., Message], path: str, name: str, value: object) -> None:
    try:
        make(**{name: value})
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(path, f"has the wrong type or is out of range ({error})") from error


def to_message(message_type: type[M], path: str, source: object, **others: object) -> M:
    """The message with every scalar and list of scalars that `source` has by the same name, and `others`.

    Raises InvalidRequestError as `build` does.
    """
    fields = {
        field.name: getattr(source, field.name)
        for field in message_type.DESCRIPTOR.fields
        if not (field.message_type or field.enum_type) and field.name not in others and hasattr(source, field.name)
    }
    return build(message_type, path, **fields, **others)


def from_message(kind: Callable[..., T], message: Message, **others: object) -> T:
    """The dataclass `kind` with every scalar and list of scalars of the same name that the message has, and `others`.

    Lists become tuples. Optional fields that the message lacks keep the dataclass's default. O(fields + list lengths).
    """
    known: dict[str, Any] = getattr(kind, "__dataclass_fields__", {})
    values: dict[str, object] = {}
    for field in message.DESCRIPTOR.fields:
        name = field.name
        if field.message_type or field.enum_type or name not in known or (field.has_presence and not message.HasField(name)):
            continue
        value = getattr(message, name)
        values[name] = tuple(value) if field.is_repeated else value
    return kind(**{**values, **others})
