"""What tests of a register share: the bench that each implementation gives, members, and waiting without a fixed time."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tandem.domain import ModelId, ReplicaTarget, Role
from tandem.membership import Member, MemberKind, Register, ServedModel, Snapshot

T = TypeVar("T")
NEVER_S = 60.0  # a poll interval that no test waits for: what comes earlier came from a hint
SOON_S = 5.0

MODEL = ModelId("m")
SERVED = ServedModel(model=MODEL, is_held=True)
PREFILL = ReplicaTarget(model=MODEL, role=Role.PREFILL, replicas=2)
DECODE = ReplicaTarget(model=MODEL, role=Role.DECODE, replicas=3)


class WatchedRegister(Register, Protocol):
    """A register whose watchers can be closed, as all of ours."""

    def snapshots(self, poll_s: float) -> AsyncGenerator[Snapshot, None]: ...

    def nudges(self, poll_s: float) -> AsyncGenerator[None, None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One empty register. `brief` is the same one with leases that `let_leases_run_out` outlasts, and targets of `brief_s` with them."""

    register: WatchedRegister
    brief: WatchedRegister
    brief_s: float
    let_leases_run_out: Callable[[], Awaitable[None]]


def member(
    member_id: str = "r1", incarnation: int = 1, kind: MemberKind = MemberKind.REPLICA, address: str = "", state: str = ""
) -> Member:
    """A member with nothing else of note."""
    return Member(kind=kind, member_id=member_id, incarnation=incarnation, address=address, state=state)


async def soon(awaitable: Awaitable[T]) -> T:
    """The result; TimeoutError where it takes as long as no hint does."""
    async with asyncio.timeout(SOON_S):
        return await awaitable


async def until(is_it: Callable[[], Awaitable[bool]]) -> None:
    """Returns when it is true; for what no hint tells of."""
    async with asyncio.timeout(SOON_S):
        while True:
            if await is_it():
                return
            await asyncio.sleep(0.01)


async def following(items: AsyncGenerator[T, None], is_it: Callable[[T], bool]) -> T:
    """The first item for which it is true: a burst of hints may show a state before it too."""
    async with asyncio.timeout(SOON_S):
        while not is_it(item := await anext(items)):
            pass
        return item


def ids(snapshot: Snapshot) -> list[str]:
    """The members' ids, in order."""
    return [item.member_id for item in snapshot.members]
