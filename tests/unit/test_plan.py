"""The plan on the wire says where the request runs, what it may still cost, and what was predicted."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from router.plan import make_plan
from router.receipts import predicted_terms
from tandem.domain import Plan, Role
from tests.router_parts import HANDING_OFF, RouterParts, make_tracked
from tests.samples import make_lease


def _plan(parts: RouterParts, *, config: RouterConfig = HANDING_OFF, deadline_s: float | None = None, attempt: int = 1) -> Plan:
    tracked = make_tracked()
    placement = parts.place(tracked)
    tracked.deadline_s, tracked.attempt = deadline_s, attempt
    plan = make_plan(tracked, placement, config, plan_id="p", now_s=1.0)
    assert tracked.first_assignment is not None
    assert plan.predicted == predicted_terms(placement, tracked.first_assignment)
    return plan


def test_workers_are_named_as_their_leases_name_them() -> None:
    parts = RouterParts("prefill-1")
    parts.see(make_lease("prefill-0", Role.PREFILL, 4, node="node-7", store_address="s:1"))
    parts.see(make_lease("decode-0"))
    plan = _plan(parts)
    assert [worker.replica_id for worker in plan.prefill] == ["prefill-0", "prefill-1"]
    first = plan.prefill[0]
    assert (first.incarnation, first.address, first.node, first.store_address) == (4, "prefill-0:1", "node-7", "s:1")
    assert (plan.decode.replica_id, plan.plan_id, plan.router_id) == ("decode-0", "p", HANDING_OFF.router_id)


def test_blocks_are_those_of_the_prompt_and_those_that_need_not_be_computed() -> None:
    parts = RouterParts("prefill-0", "decode-0")
    parts.hold("prefill-0", 4)
    plan = _plan(parts)
    assert (plan.prompt_blocks, plan.cached_blocks, plan.prefill_tokens) == (6, 4, 2 * 32)


@pytest.mark.parametrize(("deadline_s", "left_s"), [(None, None), (3.5, 2.5)])
def test_what_is_left_of_the_deadline_travels_and_no_time_stamp(deadline_s: float | None, left_s: float | None) -> None:
    assert _plan(RouterParts("decode-0"), deadline_s=deadline_s).deadline_remaining_s == left_s


def test_each_attempt_leaves_less_of_the_retry_budget() -> None:
    config = replace(HANDING_OFF, retry_budget=2)
    assert [_plan(RouterParts("decode-0"), config=config, attempt=attempt).retry_budget for attempt in (1, 2, 3)] == [2, 1, 0]


def test_one_worker_says_why() -> None:
    plan = _plan(RouterParts("decode-0"))
    assert (plan.prefill, plan.one_worker_reason) == ((), "no_prefill_worker")
