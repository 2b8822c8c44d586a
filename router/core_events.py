"""Every event of the core as a value that can be written down and given to another core.

Must not hold a prompt: of a request the core needs counts and the short hashes of its blocks, and no more than that is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from router.core import RouterCore
from router.instructions import CopyPrefix, Instruction
from router.tenants import RouterShares
from tandem.domain import (
    BlockHash,
    Lease,
    ModelId,
    Namespace,
    Receipt,
    ReplicaId,
    Request,
    RequestId,
    Sampling,
    Slo,
    Stamp,
    WorkerLoad,
)
from tandem.errors import Code, DeadlineError, Reason, TandemError, rebuild
from tandem.held_blocks import BlockChange
from tandem.short_hash import short_hashes, split
from tandem.step_sample import StepSample


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorFacts:
    """An error of ours as a value."""

    code: Code
    reason: Reason
    message: str
    retryable: bool = False
    field: str | None = None
    retry_after_s: float | None = None
    stage: str | None = None


def error_facts(error: TandemError) -> ErrorFacts:
    """What `rebuild` needs of it."""
    return ErrorFacts(
        code=error.code,
        reason=error.reason,
        message=error.message,
        retryable=error.retryable,
        field=error.field,
        retry_after_s=error.retry_after_s,
        stage=error.stage if isinstance(error, DeadlineError) else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What the core reads of a request. Token ids, stop strings and grammars are not among it."""

    request_id: RequestId
    model: ModelId
    tenant: str
    prompt_tokens: int
    resume_tokens: int
    max_tokens: int | None
    n: int
    priority: int
    sheddable: bool
    slo: Slo
    session_id: str
    expected_output_tokens: int | None

    def request(self) -> Request:
        """One that the core takes for the same."""
        return Request(
            request_id=self.request_id,
            model=self.model,
            prompt_token_ids=(0,) * self.prompt_tokens,
            sampling=Sampling(max_tokens=self.max_tokens, n=self.n),
            resume_token_ids=(0,) * self.resume_tokens,
            priority=self.priority,
            sheddable=self.sheddable,
            slo=self.slo,
            session_id=self.session_id,
            expected_output_tokens=self.expected_output_tokens,
            tenant=self.tenant,
        )


def request_facts(request: Request) -> RequestFacts:
    """Of a request that is submitted."""
    return RequestFacts(
        request_id=request.request_id,
        model=request.model,
        tenant=request.tenant,
        prompt_tokens=len(request.prompt_token_ids),
        resume_tokens=len(request.resume_token_ids),
        max_tokens=request.sampling.max_tokens,
        n=request.sampling.n,
        priority=request.priority,
        sheddable=request.sheddable,
        slo=request.slo,
        session_id=request.session_id,
        expected_output_tokens=request.expected_output_tokens,
    )


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """`RouterCore.submit`; 8 bytes of each block's hash."""

    request: RequestFacts
    blocks: bytes
    deadline_s: float | None
    now_s: float
    is_begun: bool

    def apply(self, core: RouterCore) -> list[Instruction]:
        """Raises InvalidRequestError as the core does."""
        hashes = [BlockHash(block) for block in split(self.blocks)]
        return core.submit(
            self.request.request(), block_hashes=hashes, deadline_s=self.deadline_s, now_s=self.now_s, is_begun=self.is_begun
        )


def short_blocks(block_hashes: Sequence[BlockHash]) -> bytes:
    """What `Submit` keeps of them; about 30 us for 2,048."""
    return short_hashes(block_hashes).tobytes()


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """`RouterCore.tokens`."""

    request_id: RequestId
    attempt: int
    tokens: int
    now_s: float

    def apply(self, core: RouterCore) -> list[Instruction]:
        """Gives it to a core."""
        return core.tokens(self.request_id, self.attempt, self.tokens, self.now_s)


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="finished"):
    """`RouterCore.finished`."""

    request_id: RequestId
    attempt: int
    receipt: Receipt
    now_s: float

    def apply(self, core: RouterCore) -> list[Instruction]:
        """Gives it to a core."""
        return core.finished(self.request_id, self.attempt, self.receipt, self.now_s)


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """`RouterCore.failed`."""

    request_id: RequestId
    attempt: int
    error: ErrorFacts
    now_s: float

    def apply(self, core: RouterCore) -> list[Instruction]:
        """Gives it to a core."""
        facts = self.error
        error = rebuild(
            facts.message,
            code=facts.code,
            reason=facts.reason,
            retryable=facts.retryable,
            field=facts.field,
            retry_after_s=facts.retry_after_s,
            stage=facts.stage,
        )
        return core.failed(self.request_id, self.attempt, error, self.now_s)


class Cancelled(msgspec.Struct, frozen=True, array_like=True, tag="cancelled"):
    """`RouterCore.cancelled`."""

    request_id: RequestId
    now_s: float

    def apply(self, core: RouterCore) -> list[Instruction]:
        """Gives it to a core."""
        return core.cancelled(self.request_id, self.now_s)


class ModelsHeld(msgspec.Struct, frozen=True, array_like=True, tag="models_held"):
    """`RouterCore.models_held`."""

    models: tuple[ModelId, ...]
    refused: dict[ModelId, str]

    def apply(self, core: RouterCore) -> None:
        """Gives it to a core."""
        core.models_held(self.models, self.refused)


class ReplicaSeen(msgspec.Struct, frozen=True, array_like=True, tag="replica_seen"):
    """`RouterCore.replica_seen`."""

    lease: Lease
    now_s: float

    def apply(self, core: RouterCore) -> list[Instruction]:
        """Gives it to a core."""
        return core.replica_seen(self.lease, self.now_s)


class ReplicaLost(msgspec.Struct, frozen=True, array_like=True, tag="replica_lost"):
    """`RouterCore.replica_lost`."""

    replica_id: ReplicaId
    incarnation: int
    now_s: float

    def apply(self, core: RouterCore) -> list[Instruction]:
        """Gives it to a core."""
        return core.replica_lost(self.replica_id, self.incarnation, self.now_s)


class Report(msgspec.Struct, frozen=True, array_like=True, tag="report"):
    """`RouterCore.report`."""

    replica_id: ReplicaId
    incarnation: int
    sequence: int
    load: WorkerLoad | None
    stamps: tuple[Stamp, ...]

    def apply(self, core: RouterCore) -> bool:
        """Gives it to a core."""
        return core.report(self.replica_id, self.incarnation, self.sequence, self.load, self.stamps)


class Steps(msgspec.Struct, frozen=True, array_like=True, tag="steps"):
    """`RouterCore.steps`."""

    replica_id: ReplicaId
    incarnation: int
    samples: tuple[StepSample, ...]
    now_s: float

    def apply(self, core: RouterCore) -> bool:
        """Gives it to a core."""
        return core.steps(self.replica_id, self.incarnation, self.samples, self.now_s)


class Cached(msgspec.Struct, frozen=True, array_like=True, tag="cached"):
    """`RouterCore.cached`."""

    replica_id: ReplicaId
    incarnation: int
    change: BlockChange

    def apply(self, core: RouterCore) -> bool:
        """Gives it to a core."""
        return core.cached(self.replica_id, self.incarnation, self.change)


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="stored"):
    """`RouterCore.stored`."""

    node: str
    namespace: Namespace
    change: BlockChange

    def apply(self, core: RouterCore) -> None:
        """Gives it to a core."""
        core.stored(self.node, self.namespace, self.change)


class StoreLost(msgspec.Struct, frozen=True, array_like=True, tag="store_lost"):
    """`RouterCore.store_lost`."""

    node: str

    def apply(self, core: RouterCore) -> None:
        """Gives it to a core."""
        core.store_lost(self.node)


class StoresKnown(msgspec.Struct, frozen=True, array_like=True, tag="stores_known"):
    """`RouterCore.stores_known`."""

    nodes: tuple[str, ...]

    def apply(self, core: RouterCore) -> None:
        """Gives it to a core."""
        core.stores_known(self.nodes)


class CopyEnded(msgspec.Struct, frozen=True, array_like=True, tag="copy_ended"):
    """`RouterCore.copy_ended`."""

    copy: CopyPrefix
    now_s: float
    is_whole: bool

    def apply(self, core: RouterCore) -> None:
        """Gives it to a core."""
        core.copy_ended(self.copy, self.now_s, is_whole=self.is_whole)


class SharesHeard(msgspec.Struct, frozen=True, array_like=True, tag="shares_heard"):
    """`RouterCore.shares_heard`."""

    others: dict[str, RouterShares]

    def apply(self, core: RouterCore) -> None:
        """Gives it to a core."""
        core.shares_heard(self.others)


class Tick(msgspec.Struct, frozen=True, array_like=True, tag="tick"):
    """`RouterCore.tick`."""

    now_s: float

    def apply(self, core: RouterCore) -> list[Instruction]:
        """Gives it to a core."""
        return core.tick(self.now_s)


# Two questions: what they read of step times is kept for a while, and so they are part of the story.


class AskedRetry(msgspec.Struct, frozen=True, array_like=True, tag="retry_after_s"):
    """`RouterCore.retry_after_s`."""

    model: ModelId | None
    now_s: float

    def apply(self, core: RouterCore) -> float:
        """Asks a core."""
        return core.retry_after_s(self.model, self.now_s)


class AskedReplicas(msgspec.Struct, frozen=True, array_like=True, tag="replicas"):
    """`RouterCore.replicas`, of whose answer the predicted work counts."""

    now_s: float

    def apply(self, core: RouterCore) -> list[float]:
        """Asks a core."""
        return [status.predicted_work_s for status in core.replicas(self.now_s)]


CoreEvent = (
    Submit
    | Tokens
    | Finished
    | Failed
    | Cancelled
    | ModelsHeld
    | ReplicaSeen
    | ReplicaLost
    | Report
    | Steps
    | Cached
    | Stored
    | StoreLost
    | StoresKnown
    | CopyEnded
    | SharesHeard
    | Tick
    | AskedRetry
    | AskedReplicas
)
