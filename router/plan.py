"""From a placement to the plan on the wire. Values only."""

from router.config import RouterConfig
from router.placement import Placement
from router.receipts import predicted_terms
from router.tracked import Tracked
from tandem.domain import Lease, Plan, PlannedWorker


def make_plan(tracked: Tracked, placement: Placement, config: RouterConfig, *, plan_id: str, now_s: float) -> Plan:
    """The plan of the attempt that starts now."""
    assert tracked.first_assignment is not None
    return Plan(
        plan_id=plan_id,
        prefill=tuple(planned(lease) for lease in placement.prefill),
        decode=planned(placement.decode),
        retry_budget=config.retry_budget + 1 - tracked.tries,
        deadline_remaining_s=None if tracked.deadline_s is None else tracked.deadline_s - now_s,
        predicted=predicted_terms(placement, tracked.first_assignment),
        one_worker_reason=placement.assignment.one_worker_reason,
        router_id=config.router_id,
        slack_s=tracked.first_token_due_s - placement.assignment.own_s - now_s,
        prompt_blocks=len(tracked.block_hashes),
        cached_blocks=placement.assignment.cached_tokens // placement.decode.engine.block_size_tokens,
        prefill_tokens=placement.assignment.uncached_tokens,
    )


def planned(lease: Lease) -> PlannedWorker:
    """A replica as plans name it."""
    return PlannedWorker(
        replica_id=lease.replica_id,
        incarnation=lease.incarnation,
        address=lease.address,
        node=lease.node,
        store_address=lease.store_address,
    )
