"""Who is in a cluster: members under leases, and what every implementation of the register must offer.

Values and protocol only; `redis_register.py` implements it. A lease that runs out stops new work, never streams.
"""

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Protocol

from tandem.domain import ModelId, ReplicaTarget
from tandem.errors import ProtocolError

LEASE_S = 3.0  # three renewals may be lost; a dead worker is noticed by its broken stream long before
RENEW_S = LEASE_S / 4
REGISTER_URL = "REDIS_URL"  # the register's address in each process's environment: a command line would show its password to all users
REFILL_S = 2 * LEASE_S  # after a register came back empty: every living member has registered again by then


class MemberKind(StrEnum):
    """What a member is."""

    REPLICA = "replica"
    ROUTER = "router"
    AUTOSCALER = "autoscaler"
    STORE = "store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process and where it answers. `incarnation` grows with each start under the same id; an older one is refused."""

    kind: MemberKind
    member_id: str
    incarnation: int
    node: str = ""
    pid: int = 0
    address: str = ""  # host:port of its gRPC services
    http_address: str = ""  # host:port of a router's HTTP endpoint
    metrics_address: str = ""  # host:port of /metrics
    model: str = ""  # of a replica, as are the next three
    role: str = ""
    namespace: str = ""
    state: str = ""

    def to_json(self) -> str:
        """One line, keys in order."""
        return json.dumps(asdict(self), separators=(",", ":"))


def member_from_json(text: str | bytes) -> Member:
    """Raises ProtocolError where the text is no member. Keys of a newer version are passed over."""
    try:
        values = json.loads(text)
        known = {field.name for field in fields(Member)}
        return Member(**{**{name: value for name, value in values.items() if name in known}, "kind": MemberKind(values["kind"])})
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ProtocolError(f"a lease in the register cannot be read ({error})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model the cluster is configured to serve, with or without replicas now. Routers hold requests for it while it comes back."""

    model: ModelId
    is_held: bool  # whether a request may wait for a start-up: someone (the autoscaler) will start a replica
    error: str = ""  # why its replicas do not start; empty while they do


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The register at one moment. A changed `generation` means that it was lost and is being filled again: absence says nothing then."""

    generation: str
    members: tuple[Member, ...]
    models: tuple[ServedModel, ...] = ()
    targets: tuple[ReplicaTarget, ...] = ()  # what the leader wants now


class Register(Protocol):
    """The membership of one cluster. Every method raises UnavailableError where the register does not answer in time."""

    async def renew(self, member: Member) -> None:
        """Takes or extends the member's lease; raises PreconditionError (STALE_INCARNATION) where a newer incarnation holds it."""

    async def leave(self, member: Member) -> None:
        """Gives the lease back; nothing where it is another incarnation's."""

    async def snapshot(self) -> Snapshot:
        """All leases that have not run out, by kind and id."""

    def snapshots(self, poll_s: float) -> AsyncGenerator[Snapshot, None]:
        """A snapshot now, soon after every change and at least each `poll_s`; nothing while the register is away, then it goes on."""

    async def try_lead(self, candidate: str) -> int | None:
        """The leader's epoch where `candidate` is or becomes leader for LEASE_S, else None. Epochs only grow."""

    async def resign(self, candidate: str) -> None:
        """Gives leadership up at once."""

    async def publish(self, epoch: int, models: Sequence[ServedModel], targets: Sequence[ReplicaTarget]) -> None:
        """The leader's word to routers; raises PreconditionError (STALE_EPOCH) where a newer leader has written."""

    async def set_manual_targets(self, targets: Sequence[ReplicaTarget]) -> None:
        """Replica counts set by hand, each until it expires (`expires_in_s` 0: until replaced); a negative count ends one."""

    async def manual_targets(self) -> tuple[ReplicaTarget, ...]:
        """Those that have not expired, with the time left."""

    async def nudge(self) -> None:
        """Wakes the leader: there is demand."""

    def nudges(self, poll_s: float) -> AsyncGenerator[None, None]:
        """An item now, soon after each nudge or change of manual targets (one for a burst), and at least each `poll_s`."""

    async def close(self) -> None:
        """Closes connections; leases run out by themselves."""
