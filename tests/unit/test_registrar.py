"""The registrar over a register in memory: what it does at once. Renewing in time is in tests/integration/test_redis_register.py."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from tandem.membership import Member
from tandem.registrar import Registrar
from tests.memory_register import MemoryRegister
from tests.register_bench import following, ids, member, soon


class Fence:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


class SlowToLeave(MemoryRegister):
    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.may_leave = asyncio.Event(), asyncio.Event()

    async def leave(self, member: Member) -> None:
        self.is_asked.set()
        await self.may_leave.wait()
        await super().leave(member)


@pytest.fixture
def register() -> MemoryRegister:
    return MemoryRegister()


@asynccontextmanager
async def running(register: MemoryRegister, mine: Member) -> AsyncIterator[tuple[Registrar, asyncio.Task[None]]]:
    """A registrar at work, registered; cancelled at the end."""
    registrar = Registrar(register, mine, Fence())
    task = asyncio.create_task(registrar.run())
    async with aclosing(register.snapshots(1.0)) as snapshots:
        await following(snapshots, lambda seen: mine in seen.members)
    yield registrar, task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_member_is_registered_at_once_and_leaves_at_the_end(register: MemoryRegister) -> None:
    async with running(register, member()) as (_, task):
        assert ids(await register.snapshot()) == ["r1"]
    assert task.cancelled()
    assert (await register.snapshot()).members == ()


async def test_a_change_is_registered_at_once(register: MemoryRegister) -> None:
    async with running(register, member(state="starting")) as (registrar, _), aclosing(register.snapshots(1.0)) as snapshots:
        registrar.update(member(state="ready"))
        await following(snapshots, lambda seen: seen.members[0].state == "ready")


async def test_of_several_changes_the_last_one_counts(register: MemoryRegister) -> None:
    async with running(register, member()) as (registrar, _), aclosing(register.snapshots(1.0)) as snapshots:
        for number in range(5):
            registrar.update(member(state=str(number)))
        await following(snapshots, lambda seen: seen.members[0].state == "4")


async def test_a_change_before_the_start_is_what_is_registered(register: MemoryRegister) -> None:
    registrar = Registrar(register, member(state="starting"), Fence())
    registrar.update(member(state="ready"))
    task = asyncio.create_task(registrar.run())
    async with aclosing(register.snapshots(1.0)) as snapshots:
        assert (await following(snapshots, lambda seen: bool(seen.members))).members[0].state == "ready"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_member_that_a_newer_incarnation_replaced_ends_and_says_so_once(register: MemoryRegister) -> None:
    await register.renew(member(incarnation=2))
    fence = Fence()
    await soon(Registrar(register, member(incarnation=1), fence).run())
    assert fence.calls == 1
    assert (await register.snapshot()).members == (member(incarnation=2),)


async def test_a_member_that_is_replaced_while_it_runs_ends(register: MemoryRegister) -> None:
    async with running(register, member(incarnation=1)) as (registrar, task):
        await register.renew(member(incarnation=2))
        registrar.update(replace(member(incarnation=1), state="ready"))
        await soon(task)
    assert (await register.snapshot()).members == (member(incarnation=2),)


async def test_losing_the_register_is_logged_once_and_so_is_its_return(register: MemoryRegister, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with running(register, member()) as (registrar, _), aclosing(register.snapshots(1.0)) as snapshots:
        await anext(snapshots)
        register.is_available = False
        for state in ("a", "b"):
            registrar.update(member(state=state))
            for _ in range(10):
                await asyncio.sleep(0)
        register.is_available = True
        registrar.update(member(state="c"))
        await following(snapshots, lambda seen: seen.members[0].state == "c")
    assert [record.getMessage().split()[0] for record in caplog.records] == ["registration_lost", "registration_back"]


async def test_the_end_is_not_held_up_by_a_register_that_is_away(register: MemoryRegister) -> None:
    async with running(register, member()) as (_, task):
        register.is_available = False
    assert task.cancelled()


async def test_the_end_waits_until_the_lease_is_given_back() -> None:
    register = SlowToLeave()
    async with running(register, member()) as (_, task):
        task.cancel()
        await soon(register.is_asked.wait())
        assert not task.done()
        register.may_leave.set()
        await asyncio.wait([task])
        assert (await register.snapshot()).members == ()


async def test_a_second_cancellation_does_not_keep_the_lease() -> None:
    register = SlowToLeave()
    async with running(register, member()) as (_, task), aclosing(register.snapshots(1.0)) as snapshots:
        task.cancel()
        await soon(register.is_asked.wait())
        task.cancel()
        await asyncio.wait([task])
        register.may_leave.set()
        await following(snapshots, lambda seen: seen.members == ())
