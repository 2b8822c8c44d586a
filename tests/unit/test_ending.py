"""How a replica comes to its end: at once, or once nothing runs."""

import asyncio

from tandem.domain import Role
from tandem.ending import Ending
from tandem.worker_state import WorkerState
from tests.samples import make_lease


def make_state() -> WorkerState:
    return WorkerState(make_lease("r-0", Role.DECODE, 1))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_nothing_is_ordered_until_somebody_orders_it() -> None:
    ending = Ending()
    ordered = asyncio.create_task(ending.ordered())
    await settle()
    assert not ordered.done()
    ending.drain()
    await ordered
    assert not ending.stopped.is_set()


async def test_a_drained_replica_waits_for_what_runs() -> None:
    ending, state = Ending(), make_state()
    ending.drain()
    with state.accept("", "q", 1, prefill_tokens=1, kv_tokens=1):
        drained = asyncio.create_task(ending.drained(state, 60.0))
        await settle()
        assert not drained.done()
    await drained


async def test_a_drained_replica_without_work_ends_at_once() -> None:
    ending = Ending()
    ending.drain()
    await ending.drained(make_state(), 60.0)


async def test_a_stop_cuts_a_drain_short() -> None:
    ending, state = Ending(), make_state()
    ending.drain()
    with state.accept("", "q", 1, prefill_tokens=1, kv_tokens=1):
        drained = asyncio.create_task(ending.drained(state, 60.0))
        await settle()
        ending.drain()
        await drained
        assert ending.stopped.is_set()


async def test_a_drain_lasts_as_long_as_its_grace_time() -> None:
    ending, state = Ending(), make_state()
    ending.drain()
    with state.accept("", "q", 1, prefill_tokens=1, kv_tokens=1):
        await ending.drained(state, 0.0)
