"""Waiting for what no event tells: another process's file, lock or answer."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def poll_until(look: Callable[[], T | None], interval_s: float) -> T:
    """What `look` answers once it is neither None nor False. Bound it with a time-out."""
    while (found := look()) is None or found is False:  # noqa: ASYNC110 - nothing of ours could set an event
        await asyncio.sleep(interval_s)
    return found
