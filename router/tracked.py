"""One request as the core keeps it, and what follows from that alone: what must be known to place it, whether it may be retried.

Must not touch queue, ledger or fleet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.ledger import BookingKey
from router.output_length import LengthKey, OutputEstimate
from router.placement import CONTINUATION, Assignment, Placement
from router.prefix_index import Holder
from tandem.domain import BlockHash, Request
from tandem.errors import DeadlineError, TandemError
from tandem.session import has_lost_worker, is_continuable
from tandem.short_hash import ShortHashes, short_hashes


@dataclass(slots=True, kw_only=True)
class Tracked:
    """A request that is QUEUED (no placement) or RUNNING. Mutable; the core owns it."""

    request: Request
    block_hashes: Sequence[BlockHash]
    deadline_s: float | None
    arrived_s: float
    arrival: int  # its number
    first_token_due_s: float  # to meet its TTFT objective
    slots_ahead_s: float = 0.0  # work that waits for a slot before it
    assignment: Assignment | None = None  # while it waits: in whose line
    first_assignment: Assignment | None = None  # the first there was
    rethink_s: float = 0.0  # from when on another worker is looked for while it waits
    roomless_s: float | None = None  # since when its turn has come and no decode worker had room
    is_predicted: bool = False  # it was made at the arrival that the receipt counts from
    charged_tokens: int = 0  # of its tenant, for an attempt without a first token so far
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
    output: tuple[tuple[int, int], OutputEstimate] | None = None  # last estimated, by the tokens it had and the outcomes learnt from
    _block_keys: ShortHashes | None = None

    @property
    def block_keys(self) -> ShortHashes:
        """Its blocks as indexes know them; made once."""
        if self._block_keys is None:
            self._block_keys = short_hashes(self.block_hashes).copy()  # not a view, which would hold the whole hashes
        return self._block_keys

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

    @property
    def one_worker_reason(self) -> str:
        """Why it must not be handed off; empty where it may be."""
        return self.request.sampling.one_worker_reason() or (CONTINUATION if self.has_output else "")

    @property
    def length_key(self) -> LengthKey:
        """What its output's length is predicted from."""
        request = self.request
        return LengthKey(request.model, request.tenant, request.session_id, len(request.prompt_token_ids))

    def final_error(self, error: TandemError, *, retry_budget: int, now_s: float) -> TandemError | None:
        """The error the request ends with, or None where another worker may continue it. A move is no failure and costs nothing."""
        if not has_lost_worker(error) or not is_continuable(self.request.sampling.n, self.output_tokens) or self.tries > retry_budget:
            return error
        if self.deadline_s is not None and self.deadline_s <= now_s:
            return DeadlineError("retry")
        return None
