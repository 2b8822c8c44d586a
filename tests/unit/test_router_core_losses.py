"""Conversations with the core: failures, retries, lost and returning replicas."""

from router.config import RouterConfig
from router.instructions import Abandon, Dispatch, Reject
from tandem.domain import Namespace, Receipt, ReplicaId, ReplicaState, Role, Sampling, Stamp, StampKind, WorkerLoad
from tandem.errors import ProtocolError, Reason
from tandem.held_blocks import BlockChange
from tandem.short_hash import short_hashes
from tandem.step_sample import StepSample
from tests.core_talk import HASHES, LOST, R1, R2, make_core, only_dispatch, only_reject, predicted_work, submit
from tests.samples import make_lease, make_request


def test_a_failed_attempt_goes_on_elsewhere_with_its_tokens_counted() -> None:
    core = make_core(replicas=("prefill-0", "decode-0", "decode-1"))
    assert only_dispatch(submit(core)).plan.decode.replica_id == "decode-0"
    core.tokens(R1, 1, 5, 0.1)
    retry = only_dispatch(core.failed(R1, 1, LOST, 0.2))
    assert (retry.attempt, retry.plan.decode.replica_id, retry.plan.retry_budget) == (2, "decode-1", 1)
    core.check_invariants()
    assert core.running_requests == 1


def test_a_replica_that_is_lost_before_the_first_token_does_not_come_back_as_a_holder() -> None:
    core = make_core(replicas=("prefill-0", "decode-0"))
    submit(core)
    core.replica_lost(ReplicaId("prefill-0"), 1, 0.1)
    core.tokens(R1, 1, 1, 0.2)
    assert set(core.prefixes.replicas) == {("decode-0", 1)}
    core.check_invariants()


def test_both_are_lost_before_the_first_token() -> None:
    core = make_core(replicas=("prefill-0", "decode-0"))
    submit(core)
    for name in ("prefill-0", "decode-0"):
        core.replica_lost(ReplicaId(name), 1, 0.1)
    core.tokens(R1, 1, 1, 0.2)
    core.check_invariants()


def test_events_of_an_older_attempt_are_ignored() -> None:
    core = make_core(replicas=("decode-0", "decode-1"))
    submit(core)
    core.failed(R1, 1, LOST, 0.1)
    core.tokens(R1, 1, 5, 0.2)
    assert core.failed(R1, 1, LOST, 0.2) == []
    assert core.finished(R1, 1, Receipt(request_id=R1), 0.2) == []
    assert core.running_requests == 1
    core.tokens(R2, 1, 1, 0.2)


def test_a_failure_that_another_worker_would_repeat_ends_the_request() -> None:
    core = make_core(config=RouterConfig(one_worker_max_tokens=0, max_running_requests=1))
    submit(core)
    submit(core, "r2")
    error = ProtocolError("gap")
    reject, dispatch = core.failed(R1, 1, error, 0.1)
    assert reject == Reject(request_id=R1, error=error)
    assert isinstance(dispatch, Dispatch)
    assert dispatch.request_id == R2


def test_the_retry_budget_ends() -> None:
    core = make_core(replicas=("decode-0", "decode-1", "decode-2", "decode-3"))
    submit(core)
    assert only_dispatch(core.failed(R1, 1, LOST, 0.1)).attempt == 2
    assert only_dispatch(core.failed(R1, 2, LOST, 0.2)).attempt == 3
    assert only_reject(core.failed(R1, 3, LOST, 0.3)).error is LOST


def test_the_only_replica_is_held_back_for_a_while_after_it_failed_a_request() -> None:
    core = make_core(replicas=("decode-0",))
    submit(core)
    assert core.failed(R1, 1, LOST, 1.0) == []
    assert (core.queued_requests, core.running_requests) == (1, 0)
    assert core.tick(1.4) == []
    assert only_dispatch(core.tick(1.5)).attempt == 2


def test_a_new_incarnation_takes_the_request_at_once() -> None:
    core = make_core(replicas=("decode-0",))
    submit(core)
    core.failed(R1, 1, LOST, 1.0)
    core.replica_lost(ReplicaId("decode-0"), 1, 1.1)
    dispatch = only_dispatch(core.replica_seen(make_lease(incarnation=2), 1.2))
    assert (dispatch.attempt, dispatch.plan.decode.incarnation) == (2, 2)


def test_the_loss_of_a_decode_worker_abandons_its_requests_only() -> None:
    core = make_core(replicas=("prefill-0", "decode-0", "decode-1"))
    submit(core)
    other = only_dispatch(submit(core, "r2"))
    assert other.plan.decode.replica_id == "decode-1"
    (abandon,) = core.replica_lost(ReplicaId("decode-0"), 1, 0.1)
    assert isinstance(abandon, Abandon)
    assert (abandon.request_id, abandon.attempt, abandon.error.reason) == (R1, 1, Reason.WORKER_LOST)
    assert core.replica_lost(ReplicaId("decode-0"), 1, 0.2) == []
    assert only_dispatch(core.failed(R1, 1, abandon.error, 0.2)).plan.decode.replica_id == "decode-1"
    core.check_invariants()


def test_the_loss_of_a_prefill_worker_abandons_nothing() -> None:
    core = make_core(replicas=("prefill-0", "decode-0"))
    submit(core)
    assert core.replica_lost(ReplicaId("prefill-0"), 1, 0.1) == []
    core.tokens(R1, 1, 1, 0.2)
    core.check_invariants()


def test_a_newer_incarnation_ends_the_older_and_an_older_is_ignored() -> None:
    core = make_core(replicas=("decode-0",))
    submit(core)
    (abandon,) = core.replica_seen(make_lease(incarnation=3), 0.1)
    assert isinstance(abandon, Abandon)
    assert core.replica_seen(make_lease(incarnation=2), 0.2) == []
    assert core.replica_lost(ReplicaId("decode-0"), 1, 0.2) == []
    assert core.replicas(0.0)[0].lease.incarnation == 3


def test_a_draining_replica_gets_no_new_requests_and_keeps_its_bookings() -> None:
    core = make_core(replicas=("decode-0", "decode-1"))
    submit(core, prompt_tokens=10)
    core.replica_seen(make_lease(state=ReplicaState.DRAINING), 0.1)
    assert predicted_work(core)["decode-0"] > 0.0
    assert only_dispatch(submit(core, "r2")).plan.decode.replica_id == "decode-1"
    assert only_dispatch(submit(core, "r3")).plan.decode.replica_id == "decode-1"


def test_a_request_without_a_replica_waits_and_is_refused_in_the_end() -> None:
    core = make_core(replicas=("decode-0",))
    core.replica_lost(ReplicaId("decode-0"), 1, 1.0)
    assert submit(core, now_s=3.0) == []
    assert core.tick(7.9) == []
    error = only_reject(core.tick(8.0)).error
    assert (error.reason, error.retryable, error.retry_after_s) == (Reason.NO_REPLICA, True, 5.0)


def test_a_waiting_request_starts_with_the_first_replica() -> None:
    core = make_core(replicas=("decode-0",))
    core.replica_lost(ReplicaId("decode-0"), 1, 1.0)
    submit(core, now_s=3.0)
    dispatch = only_dispatch(core.replica_seen(make_lease("prefill-0", Role.PREFILL), 4.0))
    assert dispatch.plan.one_worker_reason == "no_decode_worker"


def test_several_choices_are_not_continued_after_their_first_token() -> None:
    core = make_core(replicas=("decode-0", "decode-1"))
    request = make_request(sampling=Sampling(n=2))
    assert only_dispatch(core.submit(request, block_hashes=(), deadline_s=None, now_s=0.0)).plan.one_worker_reason == "n"
    core.tokens(R1, 1, 1, 0.1)
    assert only_reject(core.failed(R1, 1, LOST, 0.2)).error is LOST


def test_an_id_used_again_gets_new_attempt_numbers_and_its_whole_budget() -> None:
    core = make_core(replicas=("decode-0", "decode-1"))
    submit(core)
    core.failed(R1, 1, LOST, 0.1)
    core.cancelled(R1, 0.2)
    again = only_dispatch(submit(core, now_s=0.3))
    assert (again.attempt, again.plan.retry_budget) == (3, 2)
    late = Stamp(request_id=R1, attempt=1, kind=StampKind.FINISHED)
    core.report(ReplicaId("decode-0"), 1, 1, WorkerLoad(), [late])
    assert sum(predicted_work(core).values()) > 0.0
    core.cancelled(R1, 1.0)
    core.tick(5.9)
    assert only_dispatch(submit(core, now_s=5.9)).attempt == 4
    core.cancelled(R1, 6.0)
    core.tick(11.0)
    assert only_dispatch(submit(core, now_s=11.0)).attempt == 1


def test_measured_steps_are_believed_of_a_known_incarnation_only() -> None:
    core = make_core()
    step = StepSample(prefill_tokens=0, prefill_pairs=0, decode_requests=1, kv_tokens=10, duration_s=0.002)
    assert core.steps(ReplicaId("decode-0"), 1, [step], 0.0)
    assert not core.steps(ReplicaId("decode-0"), 2, [step], 0.0)
    assert not core.steps(ReplicaId("decode-9"), 1, [step], 0.0)


def test_a_replicas_cache_is_believed_of_a_known_incarnation_only_and_forgotten_with_it() -> None:
    core = make_core(replicas=["decode-0"])
    change = BlockChange(stored=short_hashes(HASHES[:2]).tobytes())
    assert core.cached(ReplicaId("decode-0"), 1, change)
    assert not core.cached(ReplicaId("decode-0"), 2, change)
    assert not core.cached(ReplicaId("decode-9"), 1, change)
    assert core.prefixes.match(HASHES) == {(ReplicaId("decode-0"), 1): 2}
    core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
    assert core.prefixes.match(HASHES) == {}


def test_a_nodes_store_is_known_until_it_is_lost() -> None:
    core = make_core(replicas=[])
    namespaces = [Namespace("ab" * 16), Namespace("cd" * 16)]
    for namespace in namespaces:
        core.stored("node", namespace, BlockChange(stored=short_hashes(HASHES).tobytes()))
    core.stored("other", namespaces[0], BlockChange(stored=short_hashes(HASHES[:1]).tobytes()))
    core.store_lost("node")
    match = core.prefixes.match(HASHES)
    assert [match.store_blocks("node", namespace) for namespace in namespaces] == [0, 0]
    assert match.store_blocks("other", namespaces[0]) == 1


def test_a_worker_that_did_not_prefill_after_all_has_what_it_had_before() -> None:
    core = make_core()
    only_dispatch(submit(core))
    core.tokens(R1, 1, 1, 0.1)
    both = {(ReplicaId("prefill-0"), 1): 3, (ReplicaId("decode-0"), 1): 3}
    assert core.prefixes.match(HASHES) == both
    core.finished(R1, 1, Receipt(request_id=R1, prefill_replica_id="decode-0"), 0.2)
    assert core.prefixes.match(HASHES) == {(ReplicaId("decode-0"), 1): 3}


def test_a_worker_that_prefilled_as_planned_has_the_prompt() -> None:
    core = make_core()
    only_dispatch(submit(core))
    core.tokens(R1, 1, 1, 0.1)
    core.finished(R1, 1, Receipt(request_id=R1, prefill_replica_id="prefill-0"), 0.2)
    assert len(core.prefixes.match(HASHES)) == 2
