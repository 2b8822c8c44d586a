"""Conversations with the core: events in, instructions out."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import Abandon, Dispatch, Instruction, Reject
from router.ledger import Stamp, StampKind
from tandem.domain import BlockHash, ModelId, Receipt, ReplicaId, ReplicaState, RequestId, Role, Sampling, WorkerLoad
from tandem.errors import DeadlineError, EngineError, InvalidRequestError, NotFoundError, OverloadedError, ProtocolError, Reason
from tests.samples import make_lease, make_request

R1, R2, R3 = (RequestId(f"r{number}") for number in (1, 2, 3))
HASHES = [BlockHash(bytes([number])) for number in range(3)]
LOST = EngineError("died")


def _core(*, replicas: Sequence[str] = ("prefill-0", "decode-0"), config: RouterConfig | None = None) -> RouterCore:
    core = RouterCore(RouterConfig() if config is None else config, Random(7))
    for name in replicas:
        assert core.replica_seen(make_lease(name, Role(name.split("-")[0])), 0.0) == []
    return core


def _submit(
    core: RouterCore,
    request_id: str = "r1",
    now_s: float = 0.0,
    *,
    deadline_s: float | None = None,
    prompt_tokens: int = 100,
    priority: int = 0,
) -> list[Instruction]:
    request = make_request(request_id, prompt_tokens, priority=priority)
    instructions = core.submit(request, block_hashes=HASHES, deadline_s=deadline_s, now_s=now_s)
    core.check_invariants()
    return instructions


def _dispatch(instructions: Sequence[Instruction]) -> Dispatch:
    (instruction,) = instructions
    assert isinstance(instruction, Dispatch)
    return instruction


def _reject(instructions: Sequence[Instruction]) -> Reject:
    (instruction,) = instructions
    assert isinstance(instruction, Reject)
    return instruction


def _work(core: RouterCore) -> dict[str, float]:
    core.check_invariants()
    return {status.lease.replica_id: status.predicted_work_s for status in core.replicas()}


def test_a_request_is_dispatched_to_a_prefill_and_a_decode_worker_together() -> None:
    core = _core()
    dispatch = _dispatch(_submit(core, deadline_s=4.0, now_s=1.0))
    plan = dispatch.plan
    assert (dispatch.request_id, dispatch.attempt) == (R1, 1)
    assert [worker.replica_id for worker in plan.prefill] == ["prefill-0"]
    assert (plan.decode.replica_id, plan.decode.address, plan.decode.incarnation) == ("decode-0", "decode-0:1", 1)
    assert (plan.deadline_remaining_s, plan.retry_budget, plan.one_worker_reason) == (3.0, 2, "")
    assert (plan.prompt_blocks, plan.cached_blocks, plan.router_id) == (3, 0, "router-0")
    assert {term.name for term in plan.predicted} == {"queue_s", "backlog_s", "prefill_s", "ttft_s", "tpot_s"}
    assert (core.queued_requests, core.running_requests) == (0, 1)


def test_the_work_is_booked_at_dispatch_and_freed_at_the_end() -> None:
    core = _core()
    _submit(core)
    work = _work(core)
    assert work["prefill-0"] > 0.0
    assert work["decode-0"] == 0.0
    core.tokens(R1, 1, 1, 0.1)
    assert _work(core)["prefill-0"] == 0.0
    core.tokens(R1, 1, 4, 0.2)
    assert core.finished(R1, 1, Receipt(request_id=R1), 0.3) == []
    assert set(_work(core).values()) == {0.0}
    assert core.running_requests == 0


def test_a_computed_prefix_is_known_for_the_next_request() -> None:
    core = _core(replicas=("prefill-0", "prefill-1", "decode-0"))
    first = _dispatch(_submit(core))
    core.tokens(R1, 1, 1, 0.1)
    core.cancelled(R1, 0.2)
    second = _dispatch(_submit(core, "r2"))
    assert second.plan.prefill[0] == first.plan.prefill[0]
    assert second.plan.cached_blocks == 3


def test_a_short_prompt_is_booked_on_the_decode_worker_alone() -> None:
    core = _core()
    plan = _dispatch(_submit(core, prompt_tokens=10)).plan
    assert (plan.prefill, plan.one_worker_reason) == ((), "short_prompt")
    assert _work(core)["decode-0"] > 0.0
    assert _work(core)["prefill-0"] == 0.0
    core.tokens(R1, 1, 1, 0.1)
    core.check_invariants()


def test_an_unknown_model_is_refused_with_the_names() -> None:
    core = _core()
    assert core.fleet.models == ("m",)
    request = replace(make_request(), model=ModelId("x"))
    reject = _reject(core.submit(request, block_hashes=(), deadline_s=None, now_s=0.0))
    assert isinstance(reject.error, NotFoundError)
    assert "m" in reject.error.message


def test_an_id_in_use_is_refused_without_harm_to_its_owner() -> None:
    core = _core()
    _submit(core)
    with pytest.raises(InvalidRequestError, match="is being served"):
        _submit(core)
    assert core.running_requests == 1


def test_a_request_whose_deadline_has_passed_is_refused() -> None:
    assert isinstance(_reject(_submit(_core(), now_s=5.0, deadline_s=5.0)).error, DeadlineError)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    core = _core(config=RouterConfig(max_running_requests=1, max_queued_requests=1))
    _submit(core)
    assert _submit(core, "r2") == []
    error = _reject(_submit(core, "r3")).error
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == core.retry_after_s() > 0.0


def test_a_free_slot_goes_to_the_most_urgent_waiting_request() -> None:
    core = _core(config=RouterConfig(max_running_requests=1))
    _submit(core)
    assert _submit(core, "r2") == []
    assert _submit(core, "r3", priority=-1) == []
    dispatch = _dispatch(core.finished(R1, 1, Receipt(request_id=R1), 2.0))
    assert dispatch.request_id == R3
    assert {term.name: term.predicted for term in dispatch.plan.predicted}["queue_s"] > 0.0
    assert _dispatch(core.cancelled(R3, 2.0)).request_id == R2


def test_a_queued_request_is_dropped_when_its_deadline_passes() -> None:
    core = _core(config=RouterConfig(max_running_requests=1))
    _submit(core)
    _submit(core, "r2", deadline_s=3.0)
    assert core.tick(2.9) == []
    reject = _reject(core.tick(3.0))
    assert reject.request_id == R2
    assert isinstance(reject.error, DeadlineError)
    core.check_invariants()


def test_a_cancelled_request_frees_everything_and_again_is_no_harm() -> None:
    core = _core(config=RouterConfig(max_running_requests=1))
    _submit(core)
    _submit(core, "r2")
    assert core.cancelled(R2, 0.1) == []
    assert core.cancelled(R1, 0.1) == []
    assert core.cancelled(R1, 0.2) == []
    assert (core.queued_requests, core.running_requests) == (0, 0)
    assert set(_work(core).values()) == {0.0}


def test_a_failed_attempt_goes_on_elsewhere_with_its_tokens_counted() -> None:
    core = _core(replicas=("prefill-0", "decode-0", "decode-1"))
    assert _dispatch(_submit(core)).plan.decode.replica_id == "decode-0"
    core.tokens(R1, 1, 5, 0.1)
    retry = _dispatch(core.failed(R1, 1, LOST, 0.2))
    assert (retry.attempt, retry.plan.decode.replica_id, retry.plan.retry_budget) == (2, "decode-1", 1)
    core.check_invariants()
    assert core.running_requests == 1


def test_events_of_an_older_attempt_are_ignored() -> None:
    core = _core(replicas=("decode-0", "decode-1"))
    _submit(core)
    core.failed(R1, 1, LOST, 0.1)
    core.tokens(R1, 1, 5, 0.2)
    assert core.failed(R1, 1, LOST, 0.2) == []
    assert core.finished(R1, 1, Receipt(request_id=R1), 0.2) == []
    assert core.running_requests == 1
    core.tokens(R2, 1, 1, 0.2)


def test_a_failure_that_another_worker_would_repeat_ends_the_request() -> None:
    core = _core(config=RouterConfig(max_running_requests=1))
    _submit(core)
    _submit(core, "r2")
    error = ProtocolError("gap")
    reject, dispatch = core.failed(R1, 1, error, 0.1)
    assert reject == Reject(request_id=R1, error=error)
    assert isinstance(dispatch, Dispatch)
    assert dispatch.request_id == R2


def test_the_retry_budget_ends() -> None:
    core = _core(replicas=("decode-0", "decode-1", "decode-2", "decode-3"))
    _submit(core)
    assert _dispatch(core.failed(R1, 1, LOST, 0.1)).attempt == 2
    assert _dispatch(core.failed(R1, 2, LOST, 0.2)).attempt == 3
    assert _reject(core.failed(R1, 3, LOST, 0.3)).error is LOST


def test_the_only_replica_is_held_back_for_a_while_after_it_failed_a_request() -> None:
    core = _core(replicas=("decode-0",))
    _submit(core)
    assert core.failed(R1, 1, LOST, 1.0) == []
    assert (core.queued_requests, core.running_requests) == (1, 0)
    assert core.tick(1.4) == []
    assert _dispatch(core.tick(1.5)).attempt == 2


def test_a_new_incarnation_takes_the_request_at_once() -> None:
    core = _core(replicas=("decode-0",))
    _submit(core)
    core.failed(R1, 1, LOST, 1.0)
    core.replica_lost(ReplicaId("decode-0"), 1, 1.1)
    dispatch = _dispatch(core.replica_seen(make_lease(incarnation=2), 1.2))
    assert (dispatch.attempt, dispatch.plan.decode.incarnation) == (2, 2)


def test_the_loss_of_a_decode_worker_abandons_its_requests_only() -> None:
    core = _core(replicas=("prefill-0", "decode-0", "decode-1"))
    _submit(core)
    other = _dispatch(_submit(core, "r2"))
    assert other.plan.decode.replica_id == "decode-1"
    (abandon,) = core.replica_lost(ReplicaId("decode-0"), 1, 0.1)
    assert isinstance(abandon, Abandon)
    assert (abandon.request_id, abandon.attempt, abandon.error.reason) == (R1, 1, Reason.WORKER_LOST)
    assert core.replica_lost(ReplicaId("decode-0"), 1, 0.2) == []
    assert _dispatch(core.failed(R1, 1, abandon.error, 0.2)).plan.decode.replica_id == "decode-1"
    core.check_invariants()


def test_the_loss_of_a_prefill_worker_abandons_nothing() -> None:
    core = _core(replicas=("prefill-0", "decode-0"))
    _submit(core)
    assert core.replica_lost(ReplicaId("prefill-0"), 1, 0.1) == []
    core.tokens(R1, 1, 1, 0.2)
    core.check_invariants()


def test_a_newer_incarnation_ends_the_older_and_an_older_is_ignored() -> None:
    core = _core(replicas=("decode-0",))
    _submit(core)
    (abandon,) = core.replica_seen(make_lease(incarnation=3), 0.1)
    assert isinstance(abandon, Abandon)
    assert core.replica_seen(make_lease(incarnation=2), 0.2) == []
    assert core.replica_lost(ReplicaId("decode-0"), 1, 0.2) == []
    assert core.replicas()[0].lease.incarnation == 3


def test_a_draining_replica_gets_no_new_requests_and_keeps_its_bookings() -> None:
    core = _core(replicas=("decode-0", "decode-1"))
    _submit(core, prompt_tokens=10)
    core.replica_seen(make_lease(state=ReplicaState.DRAINING), 0.1)
    assert _work(core)["decode-0"] > 0.0
    assert _dispatch(_submit(core, "r2")).plan.decode.replica_id == "decode-1"
    assert _dispatch(_submit(core, "r3")).plan.decode.replica_id == "decode-1"


def test_a_request_without_a_replica_waits_and_is_refused_in_the_end() -> None:
    core = _core(replicas=("decode-0",))
    core.replica_lost(ReplicaId("decode-0"), 1, 1.0)
    assert _submit(core, now_s=3.0) == []
    assert core.tick(7.9) == []
    error = _reject(core.tick(8.0)).error
    assert (error.reason, error.retryable, error.retry_after_s) == (Reason.NO_REPLICA, True, 5.0)


def test_a_waiting_request_starts_with_the_first_replica() -> None:
    core = _core(replicas=("decode-0",))
    core.replica_lost(ReplicaId("decode-0"), 1, 1.0)
    _submit(core, now_s=3.0)
    dispatch = _dispatch(core.replica_seen(make_lease("prefill-0", Role.PREFILL), 4.0))
    assert dispatch.plan.one_worker_reason == "no_decode_worker"


def test_reports_correct_the_load_and_old_ones_are_not_believed() -> None:
    core = _core()
    _submit(core)
    stamp = Stamp(request_id=R1, attempt=1, kind=StampKind.ACCEPTED)
    replica_id = ReplicaId("prefill-0")
    before = _work(core)
    assert core.report(replica_id, 1, 1, WorkerLoad(running_requests=1, pending_prefill_tokens=100, kv_tokens=100), [stamp])
    assert _work(core) == before
    assert core.replicas()[1].load.pending_prefill_tokens == 100
    assert not core.report(replica_id, 1, 1, WorkerLoad(), ())
    assert not core.report(replica_id, 2, 2, WorkerLoad(), ())


def test_stamps_that_never_come_are_forgotten() -> None:
    core = _core()
    _submit(core)
    core.cancelled(R1, 1.0)
    assert core.tick(6.0) == []
    core.check_invariants()


def test_a_finished_request_teaches_the_predictor_unless_it_was_retried() -> None:
    core = _core(replicas=("decode-0", "decode-1"))
    receipt = Receipt(request_id=R1, prefill_s=30.0, ttft_s=30.0, e2e_s=30.0)
    _submit(core)
    core.failed(R1, 1, LOST, 0.1)
    core.finished(R1, 2, receipt, 0.2)
    before = {term.name: term.predicted for term in _dispatch(_submit(core, "r2")).plan.predicted}
    core.finished(R2, 1, receipt, 0.3)
    after = {term.name: term.predicted for term in _dispatch(_submit(core, "r3")).plan.predicted}
    assert before["prefill_s"] < 0.1
    assert after["prefill_s"] > 1.0


def test_several_choices_are_not_continued_after_their_first_token() -> None:
    core = _core(replicas=("decode-0", "decode-1"))
    request = make_request(sampling=Sampling(n=2))
    assert _dispatch(core.submit(request, block_hashes=(), deadline_s=None, now_s=0.0)).plan.one_worker_reason == "n"
    core.tokens(R1, 1, 1, 0.1)
    assert _reject(core.failed(R1, 1, LOST, 0.2)).error is LOST


def test_the_same_events_give_the_same_instructions() -> None:
    def run() -> list[Instruction]:
        core = _core(replicas=("prefill-0", "prefill-1", "decode-0", "decode-1"))
        return [instruction for number in range(6) for instruction in _submit(core, f"r{number}")]

    assert run() == run()


def test_an_id_used_again_gets_new_attempt_numbers_and_its_whole_budget() -> None:
    core = _core(replicas=("decode-0", "decode-1"))
    _submit(core)
    core.failed(R1, 1, LOST, 0.1)
    core.cancelled(R1, 0.2)
    again = _dispatch(_submit(core, now_s=0.3))
    assert (again.attempt, again.plan.retry_budget) == (3, 2)
    late = Stamp(request_id=R1, attempt=1, kind=StampKind.FINISHED)
    core.report(ReplicaId("decode-0"), 1, 1, WorkerLoad(), [late])
    assert sum(_work(core).values()) > 0.0
    core.cancelled(R1, 1.0)
    core.tick(5.9)
    assert _dispatch(_submit(core, now_s=5.9)).attempt == 4
    core.cancelled(R1, 6.0)
    core.tick(11.0)
    assert _dispatch(_submit(core, now_s=11.0)).attempt == 1


def test_ended_requests_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.core._MAX_ENDED", 2)
    core = _core()
    for number in range(4):
        _submit(core, f"r{number}")
        core.cancelled(RequestId(f"r{number}"), 0.0)
    core.check_invariants()
    assert _dispatch(_submit(core, "r0")).attempt == 1
    assert _dispatch(_submit(core, "r3")).attempt == 2
