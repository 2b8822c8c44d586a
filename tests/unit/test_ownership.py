"""Who holds a thing, and what is still held once its holder has ended."""

import asyncio

from tandem.ownership import Owner, count_unowned


class Thing:
    def __init__(self) -> None:
        self.owner = Owner()


def test_what_no_task_took_is_held_by_nobody_and_no_leak() -> None:
    assert count_unowned([Thing()]) == 0


def test_what_outlives_the_task_that_took_it_is_a_leak() -> None:
    async def take() -> Thing:
        return Thing()

    async def run() -> tuple[int, int]:
        mine = Thing()
        left = await asyncio.create_task(take())
        return count_unowned([mine]), count_unowned([mine, left])

    assert asyncio.run(run()) == (0, 1)
