"""From what the router knows to one request's placement, and from the placement to the plan on the wire.

Must not change anything it reads: fleet, ledger, prefix index and predictor belong to the core.
"""

from collections.abc import Sequence

from router.config import RouterConfig
from router.fleet import Fleet
from router.ledger import Ledger
from router.placement import Candidate, Placement, place
from router.predict import Predictor
from router.prefix_index import PrefixIndex
from router.receipts import predicted_terms
from router.tracked import Tracked
from tandem.domain import Lease, Plan, PlannedWorker, Role


class Planner:
    """Places requests by the state it is given."""

    def __init__(self, config: RouterConfig, fleet: Fleet, ledger: Ledger, prefixes: PrefixIndex, predictor: Predictor) -> None:
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._prefixes = prefixes
        self._predictor = predictor

    def try_place(self, tracked: Tracked, now_s: float) -> Placement | None:
        """The best placement now; None where no worker may have it. O(replicas + matched blocks).

        Workers that failed the request are left out while there are others, and held back for a while where there are none.
        """
        model = tracked.request.model
        prefill, decode = self._fleet.ready(model, Role.PREFILL), self._fleet.ready(model, Role.DECODE)
        fresh_prefill, fresh_decode = _fresh(tracked, prefill), _fresh(tracked, decode)
        if fresh_prefill or fresh_decode or now_s < tracked.hold_until_s:
            prefill, decode = fresh_prefill, fresh_decode
        if not prefill and not decode:
            return None
        job = tracked.job(
            (decode or prefill)[0],
            handoff_min_tokens=self._config.handoff_min_tokens,
            default_output_tokens=self._config.default_output_tokens,
        )
        cached_blocks = self._prefixes.match(tracked.block_hashes)

        def candidates(leases: Sequence[Lease]) -> list[Candidate]:
            return [
                Candidate(
                    lease=lease,
                    load=self._ledger.view(lease.replica_id),
                    cached_tokens=cached_blocks.get((lease.replica_id, lease.incarnation), 0) * lease.engine.block_size_tokens,
                )
                for lease in leases
            ]

        return place(job, candidates(prefill), candidates(decode), self._predictor, self._config.max_prefill_candidates)


def make_plan(tracked: Tracked, placement: Placement, config: RouterConfig, *, plan_id: str, now_s: float) -> Plan:
    """The plan of the attempt that starts now."""
    return Plan(
        plan_id=plan_id,
        prefill=tuple(_planned(lease) for lease in placement.prefill),
        decode=_planned(placement.decode),
        retry_budget=config.retry_budget + 1 - tracked.tries,
        deadline_remaining_s=None if tracked.deadline_s is None else tracked.deadline_s - now_s,
        predicted=predicted_terms(placement, tracked.predicted_queue_s),
        one_worker_reason=placement.one_worker_reason,
        router_id=config.router_id,
        prompt_blocks=len(tracked.block_hashes),
        cached_blocks=placement.cached_tokens // placement.decode.engine.block_size_tokens,
    )


def _fresh(tracked: Tracked, leases: Sequence[Lease]) -> list[Lease]:
    holders = ((lease, (lease.replica_id, lease.incarnation)) for lease in leases)
    return [lease for lease, holder in holders if holder not in tracked.avoid and holder != tracked.moved_from]


def _planned(lease: Lease) -> PlannedWorker:
    return PlannedWorker(
        replica_id=lease.replica_id,
        incarnation=lease.incarnation,
        address=lease.address,
        node=lease.node,
        store_address=lease.store_address,
    )
