"""Who holds a thing: the task that took it. What is held once that task has ended is a leak, and a gauge that must stay at 0 counts it.

Must not free anything: whoever holds it does, on every way out.
"""

import asyncio
from collections.abc import Iterable
from typing import Protocol


class Owner:
    """The task that runs now; outside of a loop nobody, who holds nothing up."""

    def __init__(self) -> None:
        try:
            self._task = asyncio.current_task()
        except RuntimeError:
            self._task = None

    @property
    def is_gone(self) -> bool:
        """Whether the task has ended."""
        return self._task is not None and self._task.done()


class Owned(Protocol):
    """What knows who holds it."""

    owner: Owner


def count_unowned(things: Iterable[Owned]) -> int:
    """How many of them have outlived who took them; O(things)."""
    return sum(thing.owner.is_gone for thing in things)
