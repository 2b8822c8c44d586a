"""What the register says, brought to the router: replicas and stores to watch, models to hold requests for, targets, everybody's metrics.

Must not believe absence too early: a register that was lost and is filled again says nothing of who is away.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import aclosing
from typing import Protocol

from router.shell import RouterShell
from tandem.errors import TandemError
from tandem.membership import REFILL_S, Member, MemberKind, Register, Snapshot

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_AT_ZERO = "it is scaled to zero and is not started on demand"


class Follower(Protocol):
    """Who watches replicas: `router.workers.Workers`."""

    def follow(self, addresses: Collection[str]) -> None:
        """The addresses of all replicas with a lease."""


class StoreFollower(Protocol):
    """Who watches store services: `router.stores.Stores`."""

    def follow(self, addresses: Mapping[str, str]) -> None:
        """The addresses of all store services with a lease, by node."""


class RegisterView:
    """The last snapshot, and what follows from it. Run it in a task."""

    def __init__(
        self,
        register: Register,
        shell: RouterShell,
        workers: Follower,
        clock: Callable[[], float] = time.monotonic,
        *,
        stores: StoreFollower | None = None,
    ) -> None:
        self.register = register
        self.snapshot = Snapshot(generation="", members=())
        self._shell = shell
        self._workers = workers
        self._stores = stores
        self._clock = clock
        self._complete_s = 0.0  # when the present generation is believed to be complete
        self._nudge: asyncio.Task[None] | None = None
        shell.on_demand = self._on_demand

    async def run(self) -> None:
        """Takes snapshots until cancelled."""
        async with aclosing(self.register.snapshots(_POLL_S)) as snapshots:
            async for snapshot in snapshots:
                self.take(snapshot)

    def take(self, snapshot: Snapshot) -> None:
        """One snapshot. While the register is being filled again, the replicas known from before stay."""
        now_s = self._clock()
        if snapshot.generation != self.snapshot.generation:
            if self.snapshot.generation:
                logger.warning("register_lost generation=%s", snapshot.generation)
            self._complete_s = now_s + REFILL_S if self.snapshot.generation else now_s
        known = self.snapshot.members if now_s < self._complete_s else ()
        present = {(member.kind, member.member_id) for member in snapshot.members}
        members = (*snapshot.members, *(member for member in known if (member.kind, member.member_id) not in present))
        models = snapshot.models or self.snapshot.models
        self.snapshot = Snapshot(
            generation=snapshot.generation, members=members, models=models, targets=snapshot.targets or self.snapshot.targets
        )
        self._workers.follow([member.address for member in self.of(MemberKind.REPLICA) if member.address])
        if self._stores is not None:
            self._stores.follow({member.node: member.address for member in self.of(MemberKind.STORE) if member.node and member.address})
        refused = {model.model: model.error or _AT_ZERO for model in models if model.error or not model.is_held}
        self._shell.models_held([model.model for model in models if model.is_held], refused)

    def of(self, kind: MemberKind) -> list[Member]:
        """The members of one kind, by id."""
        return sorted((member for member in self.snapshot.members if member.kind is kind), key=lambda member: member.member_id)

    def _on_demand(self) -> None:
        """A request waits for a replica: wakes the autoscaler, one message at a time."""
        if self._nudge is None or self._nudge.done():
            self._nudge = asyncio.create_task(self._send_nudge(), name="nudge")

    async def _send_nudge(self) -> None:
        try:
            await self.register.nudge()
        except TandemError as error:
            logger.warning("nudge_failed error=%s", error.message)
