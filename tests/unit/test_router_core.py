"""Conversations with the core: dispatch, books, queue, reports."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from tandem.domain import ModelId, Receipt, ReplicaId, RequestId, Role, Stamp, StampKind, WorkerLoad
from tandem.errors import DeadlineError, InvalidRequestError, NotFoundError, OverloadedError
from tandem.held_blocks import BlockChange
from tandem.short_hash import short_hashes
from tandem.step_sample import StepSample
from tandem.worker_state import WorkerState, tokens_to_compute
from tests.core_talk import HASHES, LOST, R1, R2, R3, make_core, only_dispatch, only_reject, predicted_work, submit
from tests.samples import make_lease, make_request


def test_a_request_is_dispatched_to_a_prefill_and_a_decode_worker_together() -> None:
    core = make_core()
    dispatch = only_dispatch(submit(core, deadline_s=4.0, now_s=1.0))
    plan = dispatch.plan
    assert (dispatch.request_id, dispatch.attempt) == (R1, 1)
    assert [worker.replica_id for worker in plan.prefill] == ["prefill-0"]
    assert (plan.decode.replica_id, plan.decode.address, plan.decode.incarnation) == ("decode-0", "decode-0:1", 1)
    assert (plan.deadline_remaining_s, plan.retry_budget, plan.one_worker_reason) == (3.0, 2, "")
    assert (plan.prompt_blocks, plan.cached_blocks, plan.router_id) == (3, 0, "router-0")
    assert {term.name for term in plan.predicted} >= {
        "queue_s",
        "backlog_s",
        "prefill_s",
        "ttft_s",
        "ttft_q90_s",
        "tpot_s",
        "handoff_gap_s",
        "e2e_s",
        "output_tokens",
    }
    assert (core.queued_requests, core.running_requests) == (0, 1)


def test_the_work_is_booked_at_dispatch_and_freed_at_the_end() -> None:
    core = make_core()
    submit(core)
    work = predicted_work(core)
    assert work["prefill-0"] > 0.0
    assert work["decode-0"] == 0.0
    core.tokens(R1, 1, 1, 0.1)
    assert predicted_work(core)["prefill-0"] == 0.0
    core.tokens(R1, 1, 4, 0.2)
    assert core.finished(R1, 1, Receipt(request_id=R1), 0.3) == []
    assert set(predicted_work(core).values()) == {0.0}
    assert core.running_requests == 0


def test_a_computed_prefix_is_known_for_the_next_request() -> None:
    core = make_core(replicas=("prefill-0", "prefill-1", "decode-0"))
    first = only_dispatch(submit(core))
    core.tokens(R1, 1, 1, 0.1)
    core.cancelled(R1, 0.2)
    second = only_dispatch(submit(core, "r2"))
    assert second.plan.prefill[0] == first.plan.prefill[0]
    assert second.plan.cached_blocks == 3


def test_a_short_prompt_is_booked_on_the_decode_worker_alone() -> None:
    core = make_core()
    plan = only_dispatch(submit(core, prompt_tokens=10)).plan
    assert (plan.prefill, plan.one_worker_reason) == ((), "short_prompt")
    assert predicted_work(core)["decode-0"] > 0.0
    assert predicted_work(core)["prefill-0"] == 0.0
    core.tokens(R1, 1, 1, 0.1)
    core.check_invariants()


def test_an_unknown_model_is_refused_with_the_names() -> None:
    core = make_core()
    assert core.fleet.models == ("m",)
    request = replace(make_request(), model=ModelId("x"))
    reject = only_reject(core.submit(request, block_hashes=(), deadline_s=None, now_s=0.0))
    assert isinstance(reject.error, NotFoundError)
    assert "m" in reject.error.message


def test_an_id_in_use_is_refused_without_harm_to_its_owner() -> None:
    core = make_core()
    submit(core)
    with pytest.raises(InvalidRequestError, match="is being served"):
        submit(core)
    assert core.running_requests == 1


def test_a_request_whose_deadline_has_passed_is_refused() -> None:
    assert isinstance(only_reject(submit(make_core(), now_s=5.0, deadline_s=5.0)).error, DeadlineError)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    core = make_core(config=RouterConfig(one_worker_max_tokens=0, max_running_requests=1, max_queued_requests=1))
    submit(core)
    assert submit(core, "r2") == []
    error = only_reject(submit(core, "r3")).error
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == core.retry_after_s(ModelId("m"), 0.0) > 0.0


def test_a_free_slot_goes_to_the_most_urgent_waiting_request() -> None:
    core = make_core(config=RouterConfig(one_worker_max_tokens=0, max_running_requests=1))
    submit(core)
    assert submit(core, "r2") == []
    assert submit(core, "r3", priority=-1) == []
    dispatch = only_dispatch(core.finished(R1, 1, Receipt(request_id=R1), 2.0))
    assert dispatch.request_id == R3
    assert {term.name: term.predicted for term in dispatch.plan.predicted}["queue_s"] > 0.0
    assert only_dispatch(core.cancelled(R3, 2.0)).request_id == R2


def test_a_queued_request_is_dropped_when_its_deadline_passes() -> None:
    core = make_core(config=RouterConfig(one_worker_max_tokens=0, max_running_requests=1))
    submit(core)
    submit(core, "r2", deadline_s=3.0)
    assert core.tick(2.9) == []
    reject = only_reject(core.tick(3.0))
    assert reject.request_id == R2
    assert isinstance(reject.error, DeadlineError)
    core.check_invariants()


def test_a_cancelled_request_frees_everything_and_again_is_no_harm() -> None:
    core = make_core(config=RouterConfig(one_worker_max_tokens=0, max_running_requests=1))
    submit(core)
    submit(core, "r2")
    assert core.cancelled(R2, 0.1) == []
    assert core.cancelled(R1, 0.1) == []
    assert core.cancelled(R1, 0.2) == []
    assert (core.queued_requests, core.running_requests) == (0, 0)
    assert set(predicted_work(core).values()) == {0.0}


def test_reports_correct_the_load_and_old_ones_are_not_believed() -> None:
    core = make_core()
    submit(core)
    stamp = Stamp(request_id=R1, attempt=1, kind=StampKind.ACCEPTED)
    replica_id = ReplicaId("prefill-0")
    before = predicted_work(core)
    assert core.report(replica_id, 1, 1, WorkerLoad(running_requests=1, pending_prefill_tokens=100, kv_tokens=100), [stamp])
    assert predicted_work(core) == before
    assert core.replicas(0.0)[1].load.pending_prefill_tokens == 100
    assert not core.report(replica_id, 1, 1, WorkerLoad(), ())
    assert not core.report(replica_id, 2, 2, WorkerLoad(), ())


def test_a_worker_that_accepts_what_was_planned_has_no_more_ahead_than_was_booked() -> None:
    core = make_core()
    lease = make_lease("prefill-0", Role.PREFILL)
    core.cached(lease.replica_id, 1, BlockChange(stored=short_hashes(HASHES).tobytes()))
    request = make_request("r1", 100)
    plan = only_dispatch(submit(core)).plan
    before = predicted_work(core)
    assert 0 < plan.prefill_tokens < 100
    state = WorkerState(lease)
    with state.accept("router-0", R1, 1, prefill_tokens=tokens_to_compute(plan.prefill_tokens, request), kv_tokens=request.total_tokens):
        load = WorkerLoad(running_requests=1, pending_prefill_tokens=state.pending_prefill_tokens, kv_tokens=state.kv_tokens)
        assert core.report(lease.replica_id, 1, 1, load, [Stamp(request_id=R1, attempt=1, kind=StampKind.ACCEPTED)])
        assert predicted_work(core) == before


def test_stamps_that_never_come_are_forgotten() -> None:
    core = make_core()
    submit(core)
    core.cancelled(R1, 1.0)
    assert core.tick(6.0) == []
    core.check_invariants()


def test_a_finished_request_is_scored_unless_it_was_retried() -> None:
    core = make_core(replicas=("decode-0", "decode-1"))
    receipt = Receipt(request_id=R1, prefill_s=30.0, ttft_s=30.0, e2e_s=30.0, output_tokens=3)
    submit(core)
    core.failed(R1, 1, LOST, 0.1)
    core.finished(R1, 2, receipt, 0.2)
    assert core.predictor.scores.scores() == ()
    submit(core, "r2")
    core.finished(R2, 1, receipt, 0.3)
    ttft = next(score for score in core.predictor.scores.scores() if score.kind == "ttft")
    assert (ttft.outcomes_total, ttft.q90_coverage) == (1, 0.0)
    assert ttft.mape > 0.9


def test_steps_that_replicas_measured_are_what_seconds_are_predicted_from() -> None:
    core = make_core()

    def prefill_s() -> float:
        plan = only_dispatch(submit(core, prompt_tokens=2000)).plan
        core.cancelled(R1, 0.0)
        return {term.name: term.predicted for term in plan.predicted}["prefill_s"]

    before_s = prefill_s()
    step = StepSample(prefill_tokens=1000, prefill_pairs=500_000, decode_requests=0, kv_tokens=0, duration_s=5.0)
    for number in range(60):
        assert core.steps(ReplicaId("prefill-0"), 1, [step], float(number))
    assert before_s < 1.0
    assert prefill_s() > 5.0


def test_ids_that_ended_are_remembered_up_to_a_bound() -> None:
    core = make_core(replicas=("decode-0",))
    for number in range(10_001):
        core.submit(make_request(f"r{number}", 1), block_hashes=(), deadline_s=None, now_s=0.0)
        core.cancelled(RequestId(f"r{number}"), 0.0)
    core.check_invariants()
    assert only_dispatch(submit(core, "r0")).attempt == 1
    assert only_dispatch(submit(core, "r10000")).attempt == 2


def test_routers_tell_each_other_what_tenants_were_served_and_who_waits() -> None:
    core = make_core(config=RouterConfig(max_running_requests=1))
    for number, tenant in enumerate(("one", "one", "two")):
        submit(core, f"r{number}", tenant=tenant)
    told = core.shares()
    assert told.waiting == ("one", "two")
    assert list(told.served) == ["one"]
    core.shares_heard({"router-1": told})
    core.check_invariants()
