"""Who goes first in an engine: the class, then requests that have begun, then those in time by slack, then those that are late.

Must not know engines: a number comes out, lower first, as vLLM's priority scheduling takes it.
"""

_CLASS = 1 << 46
_LATE = 1 << 45
_MOST_CLASSES = 1 << 15  # beyond, classes are alike: the number must fit into 64 bits


def engine_priority(priority: int, slack_s: float, now_s: float) -> int:
    """Of a prompt that must be begun within `slack_s` seconds from `now_s` of any clock of this process; below 0 it is late."""
    due_ms = round(min(max(1e3 * (now_s + slack_s), 1.0), _LATE - 1.0))
    return _class(priority) + (_LATE if slack_s < 0.0 else 0) + due_ms


def begun_priority(priority: int) -> int:
    """Of a request whose output has begun: its client is reading."""
    return _class(priority)


def _class(priority: int) -> int:
    return _CLASS * min(max(priority, -_MOST_CLASSES), _MOST_CLASSES)
