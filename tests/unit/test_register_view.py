"""What the register says, brought to the router: whom it watches, what it holds, and what it does not believe."""

import asyncio
from collections.abc import Collection
from contextlib import suppress
from random import Random

from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.register_view import RegisterView
from router.shell import RouterShell
from tandem.domain import ModelId
from tandem.membership import REFILL_S, Member, MemberKind, ServedModel, Snapshot
from tandem.telemetry import RouterMetrics
from tests.memory_register import MemoryRegister
from tests.register_bench import DECODE, MODEL, PREFILL, SERVED, following, member

A, B = member("a", address="a:1"), member("b", address="b:1")
ROUTER = member("router-0", kind=MemberKind.ROUTER, address="r:1")


class Followed:
    """Whom the router was told to watch, time by time."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def follow(self, addresses: Collection[str]) -> None:
        self.calls.append(sorted(addresses))


class Bench:
    """A view on a register that nobody reads: snapshots are handed to it."""

    def __init__(self, register: MemoryRegister | None = None) -> None:
        self.now_s = 50.0
        config = RouterConfig()
        self.shell = RouterShell(config, RouterCore(config, Random(1)), RouterMetrics(CollectorRegistry()), lambda: 0.0)
        self.followed = Followed()
        self.view = RegisterView(register or MemoryRegister(), self.shell, self.followed, lambda: self.now_s)

    def take(self, *members: Member, generation: str = "g1", models: tuple[ServedModel, ...] = ()) -> list[str]:
        """One snapshot; the addresses that are watched then."""
        self.view.take(Snapshot(generation=generation, members=members, models=models))
        return self.followed.calls[-1]


def test_replicas_with_a_lease_are_watched_and_nobody_else() -> None:
    assert Bench().take(A, ROUTER, B) == ["a:1", "b:1"]


def test_a_replica_that_says_no_address_is_not_watched() -> None:
    assert Bench().take(A, member("mute")) == ["a:1"]


def test_a_lease_that_ran_out_is_watched_no_more() -> None:
    bench = Bench()
    bench.take(A, B)
    assert bench.take(B) == ["b:1"]


def test_after_the_loss_of_the_register_known_replicas_stay_until_all_can_be_back() -> None:
    bench = Bench()
    bench.take(A, B)
    assert bench.take(generation="g2") == ["a:1", "b:1"]
    bench.now_s += REFILL_S - 0.1
    assert bench.take(B, generation="g2") == ["a:1", "b:1"]
    bench.now_s += 0.2
    assert bench.take(B, generation="g2") == ["b:1"]


def test_a_second_loss_during_the_first_starts_the_wait_again() -> None:
    bench = Bench()
    bench.take(A)
    bench.take(generation="g2")
    bench.now_s += REFILL_S - 0.1
    bench.take(generation="g3")
    bench.now_s += 0.2
    assert bench.take(generation="g3") == ["a:1"]
    bench.now_s += REFILL_S
    assert bench.take(generation="g3") == []


def test_a_replica_that_came_back_elsewhere_is_watched_there_only() -> None:
    bench = Bench()
    bench.take(A)
    assert bench.take(member("a", 2, address="a:2"), generation="g2") == ["a:2"]


def test_the_first_register_is_believed_at_once() -> None:
    bench = Bench()
    bench.take(A)
    assert bench.take() == []


def test_models_that_are_held_can_be_waited_for_and_stay_over_a_loss() -> None:
    bench = Bench()
    other = ServedModel(model=ModelId("other"), is_held=False)
    bench.take(models=(SERVED, other))
    fleet = bench.shell.core.fleet
    assert (fleet.is_held(MODEL), fleet.is_held(other.model)) == (True, False)
    bench.take(generation="g2")
    assert fleet.is_held(MODEL)


def test_requests_for_a_model_that_cannot_start_or_is_not_started_are_refused_with_the_reason() -> None:
    bench = Bench()
    broken = ServedModel(model=MODEL, is_held=True, error="weights are missing")
    resting = ServedModel(model=ModelId("other"), is_held=False)
    bench.take(models=(broken, resting))
    for model, words in ((MODEL, "weights are missing"), (resting.model, "scaled to zero")):
        error = bench.shell.core.fleet.refusal(model)
        assert error is not None
        assert words in error.message
    bench.take(models=(SERVED, resting))
    assert bench.shell.core.fleet.refusal(MODEL) is None


def test_targets_are_the_last_ones_published() -> None:
    bench = Bench()
    for generation, targets, expected in (("g1", (PREFILL,), (PREFILL,)), ("g2", (), (PREFILL,)), ("g2", (DECODE,), (DECODE,))):
        bench.view.take(Snapshot(generation=generation, members=(), targets=targets))
        assert bench.view.snapshot.targets == expected


def test_members_of_a_kind_come_by_id() -> None:
    bench = Bench()
    bench.take(B, ROUTER, A)
    assert bench.view.of(MemberKind.REPLICA) == [A, B]
    assert bench.view.of(MemberKind.ROUTER) == [ROUTER]


async def test_what_the_register_tells_is_taken_until_the_end() -> None:
    register = MemoryRegister()
    bench = Bench(register)
    await register.renew(A)
    task = asyncio.create_task(bench.view.run())
    for renewed, expected in ((A, ["a:1"]), (B, ["a:1", "b:1"])):
        await register.renew(renewed)
        for _ in range(10):
            await asyncio.sleep(0)
        assert bench.followed.calls[-1] == expected
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_demand_wakes_the_autoscaler() -> None:
    register = MemoryRegister()
    bench = Bench(register)
    nudges = register.nudges(1.0)
    await anext(nudges)
    bench.shell.on_demand()
    await following(nudges, lambda _: True)
    await nudges.aclose()


async def test_a_register_that_is_away_does_not_stop_later_demand() -> None:
    register = MemoryRegister()
    bench = Bench(register)
    nudges = register.nudges(1.0)
    await anext(nudges)
    register.is_available = False
    bench.shell.on_demand()
    for _ in range(5):
        await asyncio.sleep(0)
    register.is_available = True
    bench.shell.on_demand()
    await following(nudges, lambda _: True)
    await nudges.aclose()
