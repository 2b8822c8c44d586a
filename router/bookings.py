"""What a dispatched request holds until its attempt ends: tokens and seconds on its workers, its objective, the charge to its tenant.

Must not decide who runs where: the core does, and says here what it has decided.
"""

from collections.abc import Mapping

from router.backlog import Backlog
from router.ledger import Ledger
from router.objectives import Objectives
from router.placement import Placement
from router.tenants import FairShares
from router.tracked import Tracked
from tandem.domain import Lease, ReplicaId, RequestId


class Bookings:
    """Keeps ledger, backlog, objectives and tenants' counters in step."""

    def __init__(self, ledger: Ledger, backlog: Backlog, objectives: Objectives, tenants: FairShares) -> None:
        self._ledger = ledger
        self._backlog = backlog
        self._objectives = objectives
        self._tenants = tenants

    def add_replica(self, lease: Lease) -> None:
        """Starts with nothing."""
        self._ledger.add_replica(lease.replica_id, lease.incarnation)
        self._backlog.add_replica(lease.replica_id)

    def remove_replica(self, replica_id: ReplicaId) -> None:
        """Forgets it."""
        self._ledger.remove_replica(replica_id)
        self._backlog.remove_replica(replica_id)

    def begin(self, tracked: Tracked, placement: Placement, now_s: float) -> None:
        """The request's attempt is sent to these workers."""
        tokens = placement.assignment.uncached_tokens
        for lease in placement.prefill[:1]:
            self._ledger.book(lease.replica_id, tracked.key, prefill_tokens=tokens, kv_tokens=tracked.total_tokens)
        decode_prefill_tokens = 0 if placement.prefill else tokens
        self._ledger.book(placement.decode.replica_id, tracked.key, prefill_tokens=decode_prefill_tokens, kv_tokens=tracked.total_tokens)
        self._objectives.add(placement.decode.replica_id, tracked.request.slo.tpot_s)
        self._backlog.start(placement.worker.replica_id, tracked.key, work_s=placement.assignment.work_s, tokens=tokens, now_s=now_s)
        self._tenants.charge_prompt(tracked.request.tenant, tokens)
        tracked.charged_tokens = tokens

    def add_output(self, tracked: Tracked, placement: Placement, tokens: int) -> None:
        """So many more tokens of output."""
        self._ledger.add_output(placement.decode.replica_id, tracked.key, tokens)
        self._tenants.charge_output(tracked.request.tenant, tokens)

    def prompt_computed(self, tracked: Tracked, placement: Placement, now_s: float) -> None:
        """The first token is there: the prefill worker's part has ended, and its tenant has had what it was charged."""
        tracked.charged_tokens = 0
        self._end_prompt(tracked, placement, now_s)

    def end(self, tracked: Tracked, placement: Placement, now_s: float) -> None:
        """The attempt is over."""
        self._ledger.release(placement.decode.replica_id, tracked.key, now_s)
        self._end_prompt(tracked, placement, now_s)
        self._objectives.remove(placement.decode.replica_id, tracked.request.slo.tpot_s)
        if tracked.charged_tokens:  # no token came of it: the next attempt pays again
            self._tenants.refund(tracked.request.tenant, tracked.charged_tokens)
            tracked.charged_tokens = 0

    def check_invariants(self, leases: tuple[Lease, ...], requests: Mapping[RequestId, Tracked]) -> None:
        """Sums are sums, and what is booked runs in that attempt; O(everything). Raises AssertionError."""
        self._ledger.check_invariants()
        self._backlog.check_invariants()
        running = sum(tracked.placement is not None for tracked in requests.values())
        assert len(self._objectives) <= running, "objectives of requests that do not run"
        for lease in leases:
            for request_id, attempt in self._ledger.open_bookings(lease.replica_id):
                tracked = requests[request_id]
                assert tracked.placement is not None, f"{request_id} is booked on {lease.replica_id} and waits"
                assert tracked.attempt == attempt, f"{request_id} is booked on {lease.replica_id} for an old attempt"

    def _end_prompt(self, tracked: Tracked, placement: Placement, now_s: float) -> None:
        for lease in placement.prefill[:1]:
            self._ledger.release(lease.replica_id, tracked.key, now_s)
        self._backlog.end(placement.worker.replica_id, tracked.key, now_s)
