"""A register in memory with a clock from outside: the model the real one is compared with, and what others' unit tests use."""

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tandem.domain import ModelId, ReplicaTarget, Role
from tandem.errors import PreconditionError, Reason, UnavailableError
from tandem.membership import LEASE_S, Member, MemberKind, ServedModel, Snapshot

T = TypeVar("T")
Key = tuple[MemberKind, str]
_generations = itertools.count(1)  # of all registers of a test run: no two are alike


@dataclass(slots=True, kw_only=True)
class _Data:
    """What a server loses at a restart."""

    generation: str = field(default_factory=lambda: f"generation-{next(_generations)}")
    leases: dict[Key, tuple[Member, float]] = field(default_factory=dict)
    fence: dict[Key, int] = field(default_factory=dict)
    leader: tuple[str, float] = ("", -math.inf)
    newest_epoch: int = 0
    manual: dict[tuple[ModelId, Role], tuple[int, float | None]] = field(default_factory=dict)
    models: tuple[ServedModel, ...] = ()
    targets: tuple[ReplicaTarget, ...] = ()


class MemoryRegister:
    """`Register` of one cluster; everybody in a test shares one object. No timers: `wake` stands for a poll interval that passed.

    `is_available` False: every call raises UnavailableError and watchers yield nothing, until it is True and `wake` is called.
    """

    def __init__(self, now_s: Callable[[], float] = lambda: 0.0) -> None:
        self.is_available = True
        self._now_s = now_s
        self._data = _Data()
        self._epoch = 0  # the next leader's is higher, over restarts too
        self._watchers: dict[str, list[asyncio.Event]] = {"changes": [], "nudges": []}

    def restart_empty(self) -> None:
        """As a server that lost its data: nothing is known, and the generation is another one. Nobody is woken."""
        self._data = _Data()

    def wake(self) -> None:
        """As if every watcher's poll interval had passed."""
        for channel in self._watchers:
            self._hint(channel)

    async def renew(self, member: Member) -> None:
        self._check_available()
        key = (member.kind, member.member_id)
        if member.incarnation < self._data.fence.get(key, member.incarnation):
            raise PreconditionError(f"a newer incarnation of {member.member_id} is registered", reason=Reason.STALE_INCARNATION)
        before = self._held().get(key)
        self._data.fence[key] = member.incarnation
        self._data.leases[key] = (member, self._now_s() + LEASE_S)
        if before != member:
            self._hint("changes")

    async def leave(self, member: Member) -> None:
        self._check_available()
        key = (member.kind, member.member_id)
        if self._data.fence.get(key) == member.incarnation and self._data.leases.pop(key, None) is not None:
            self._hint("changes")

    async def snapshot(self) -> Snapshot:
        return self._snapshot()

    def snapshots(self, poll_s: float) -> AsyncGenerator[Snapshot, None]:
        return self._watch("changes", self._snapshot)

    async def try_lead(self, candidate: str) -> int | None:
        self._check_available()
        leader, ends_s = self._data.leader
        is_led = ends_s > self._now_s()
        if is_led and leader != candidate:
            return None
        if not is_led:
            self._epoch = self._data.newest_epoch = self._epoch + 1
        self._data.leader = (candidate, self._now_s() + LEASE_S)
        return self._epoch

    async def resign(self, candidate: str) -> None:
        self._check_available()
        if self._data.leader[0] == candidate:
            self._data.leader = ("", -math.inf)

    async def publish(self, epoch: int, models: Sequence[ServedModel], targets: Sequence[ReplicaTarget]) -> None:
        self._check_available()
        if epoch < self._data.newest_epoch:
            raise PreconditionError(f"there is a newer leader than that of epoch {epoch}", reason=Reason.STALE_EPOCH)
        self._data.newest_epoch = epoch
        before = (self._data.models, self._data.targets)
        self._data.models, self._data.targets = tuple(models), tuple(targets)
        if before != (self._data.models, self._data.targets):
            self._hint("changes")

    async def set_manual_targets(self, targets: Sequence[ReplicaTarget]) -> None:
        self._check_available()
        for target in targets:
            key = (target.model, target.role)
            if target.replicas < 0:
                self._data.manual.pop(key, None)
            else:
                self._data.manual[key] = (target.replicas, self._now_s() + target.expires_in_s if target.expires_in_s else None)
        self._hint("nudges")

    async def manual_targets(self) -> tuple[ReplicaTarget, ...]:
        self._check_available()
        now_s = self._now_s()
        return tuple(
            ReplicaTarget(model=model, role=role, replicas=replicas, expires_in_s=0.0 if ends_s is None else ends_s - now_s)
            for (model, role), (replicas, ends_s) in sorted(self._data.manual.items(), key=lambda item: item[0])
            if ends_s is None or ends_s > now_s
        )

    async def nudge(self) -> None:
        self._check_available()
        self._hint("nudges")

    def nudges(self, poll_s: float) -> AsyncGenerator[None, None]:
        return self._watch("nudges", self._check_available)

    async def close(self) -> None:
        pass

    def _held(self) -> dict[Key, Member]:
        leases = sorted(self._data.leases.items(), key=lambda item: item[0])
        return {key: member for key, (member, ends_s) in leases if ends_s > self._now_s()}

    def _snapshot(self) -> Snapshot:
        self._check_available()
        data = self._data
        return Snapshot(generation=data.generation, members=tuple(self._held().values()), models=data.models, targets=data.targets)

    async def _watch(self, channel: str, read: Callable[[], T]) -> AsyncGenerator[T, None]:
        hinted = asyncio.Event()
        self._watchers[channel].append(hinted)
        try:
            while True:
                hinted.clear()
                if self.is_available:
                    yield read()
                await hinted.wait()
        finally:
            self._watchers[channel].remove(hinted)

    def _hint(self, channel: str) -> None:
        for hinted in self._watchers[channel]:
            hinted.set()

    def _check_available(self) -> None:
        if not self.is_available:
            raise UnavailableError("the register does not answer", reason=Reason.NO_REGISTER)
