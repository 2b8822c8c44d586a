"""One request as the core keeps it, and what follows from that alone: its job, whether it may be retried.

Must not touch queue, ledger or fleet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.ledger import BookingKey
from router.placement import CONTINUATION, Job, Placement
from router.prefix_index import Holder
from tandem.domain import BlockHash, Lease, Request
from tandem.errors import DeadlineError, TandemError
from tandem.session import has_lost_worker, is_continuable

_HANDOFF_MIN_BLOCKS = 2


@dataclass(slots=True, kw_only=True)
class Tracked:
    """A request that is QUEUED (no placement) or RUNNING. Mutable; the core owns it."""

    request: Request
    block_hashes: Sequence[BlockHash]
    deadline_s: float | None
    predicted_queue_s: float
    attempts_before: int = 0  # of earlier requests of the same id, whose stamps may still come
    attempt: int = 0  # 0: none yet
    output_tokens: int = 0  # sent by this router, resumed ones not included
    has_first_token: bool = False  # of this attempt
    is_moving: bool = False  # this attempt was told to end, so that the request goes on elsewhere
    moves: int = 0  # attempts that ended so
    moved_from: Holder | None = None  # not there again at once
    placement: Placement | None = None
    dispatched_s: float = 0.0
    avoid: set[Holder] = field(default_factory=set)  # replicas that failed it
    hold_until_s: float = 0.0  # before this they are not tried again

    @property
    def key(self) -> BookingKey:
        """What its bookings are known by."""
        return self.request.request_id, self.attempt

    @property
    def tries(self) -> int:
        """Attempts of this request so far, those not counted that ended because it was moved."""
        return self.attempt - self.attempts_before - self.moves

    @property
    def has_output(self) -> bool:
        """Whether the client has output already, from here or from before."""
        return bool(self.output_tokens or self.request.resume_token_ids)

    @property
    def total_tokens(self) -> int:
        """Prompt and output so far: what a worker must hold before the next token."""
        return self.request.total_tokens + self.output_tokens

    def job(self, lease: Lease, *, handoff_min_tokens: int | None, default_output_tokens: int) -> Job:
        """What is to be placed; `lease` is any of the model's, for its block size."""
        sampling = self.request.sampling
        expected = self.request.expected_output_tokens or default_output_tokens
        if sampling.max_tokens is not None:
            expected = min(expected, sampling.max_tokens)
        if handoff_min_tokens is None:
            handoff_min_tokens = _HANDOFF_MIN_BLOCKS * lease.engine.block_size_tokens
        return Job(
            model=self.request.model,
            total_tokens=self.total_tokens,
            expected_output_tokens=expected,
            one_worker_reason=sampling.one_worker_reason() or (CONTINUATION if self.has_output else None),
            handoff_min_tokens=handoff_min_tokens,
        )

    def final_error(self, error: TandemError, *, retry_budget: int, now_s: float) -> TandemError | None:
        """The error the request ends with, or None where another worker may continue it. A move is no failure and costs nothing."""
        if not has_lost_worker(error) or not is_continuable(self.request.sampling.n, self.output_tokens) or self.tries > retry_budget:
            return error
        if self.deadline_s is not None and self.deadline_s <= now_s:
            return DeadlineError("retry")
        return None
