"""What the core tells the shell to do, and what it tells of its state. Values only."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.domain import BlockHash, Lease, Namespace, Plan, RequestId, WorkerLoad
from tandem.errors import TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Run the request by this plan, from its resumed tokens and those already sent.

    `attempt` grows with each try, over requests that used the same id shortly before too: no two runs share both.
    """

    request_id: RequestId
    attempt: int
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """The attempt's decode worker is gone: stop listening to it and report `error` as its failure."""

    request_id: RequestId
    attempt: int
    error: TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """The request has ended with this error; the core has forgotten it."""

    request_id: RequestId
    error: TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPrefix:
    """Have a node's store fetch these leading blocks from another node's, and report its end.

    No request waits for it: `request_id` is the one that made it due.
    """

    request_id: RequestId
    namespace: Namespace
    block_hashes: Sequence[BlockHash]
    source_node: str
    target_node: str


Instruction = Dispatch | Abandon | Reject | CopyPrefix


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """A reachable replica: its lease, its last totals, and the prefill seconds this router sees ahead of it."""

    lease: Lease
    load: WorkerLoad
    predicted_work_s: float
