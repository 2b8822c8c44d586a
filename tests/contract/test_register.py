"""The register in memory keeps to the contract; tests/integration/test_redis_register.py holds the real one to it."""

from contextlib import aclosing

import pytest

from tandem.errors import UnavailableError
from tandem.membership import LEASE_S
from tests.memory_register import MemoryRegister
from tests.register_bench import Bench, ids, member, soon
from tests.register_contract import LeaderContract, ManualTargetContract, RegisterContract, WatchContract


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def register(clock: Clock) -> MemoryRegister:
    return MemoryRegister(clock)


@pytest.fixture
def bench(clock: Clock, register: MemoryRegister) -> Bench:
    async def let_leases_run_out() -> None:
        clock.now_s += LEASE_S + 0.001
        register.wake()

    return Bench(register=register, brief=register, brief_s=LEASE_S, let_leases_run_out=let_leases_run_out)


class TestMembers(RegisterContract):
    pass


class TestWatchers(WatchContract):
    pass


class TestLeader(LeaderContract):
    pass


class TestManualTargets(ManualTargetContract):
    pass


class TestWhatOnlyTheFakeCan:
    async def test_a_register_that_is_away_answers_nobody(self, register: MemoryRegister) -> None:
        register.is_available = False
        with pytest.raises(UnavailableError):
            await register.renew(member())

    async def test_watchers_go_on_when_it_is_back_empty(self, register: MemoryRegister) -> None:
        await register.renew(member())
        async with aclosing(register.snapshots(1.0)) as snapshots:
            before = await soon(anext(snapshots))
            register.is_available = False
            register.wake()
            register.restart_empty()
            register.is_available = True
            register.wake()
            after = await soon(anext(snapshots))
        assert (ids(before), ids(after)) == (["r1"], [])
        assert before.generation != after.generation
