"""Conversations with the core about models that somebody starts replicas of: who waits, how long, and what that is worth."""

import pytest

from router.config import RouterConfig
from tandem.domain import ModelId, ReplicaId, ReplicaState
from tandem.errors import Reason, UnavailableError
from tests.core_talk import R1, make_core, only_dispatch, only_reject, submit
from tests.samples import make_lease, make_request

M = ModelId("m")
CONFIG = RouterConfig(no_replica_wait_s=5.0, cold_start_wait_s=60.0)


def test_a_model_is_served_while_a_replica_of_it_takes_requests() -> None:
    core = make_core(replicas=())
    assert not core.is_served(M)
    core.replica_seen(make_lease(), 0.0)
    assert core.is_served(M)
    core.replica_seen(make_lease(state=ReplicaState.DRAINING), 1.0)
    assert not core.is_served(M)


def test_requests_for_a_held_model_wait_as_long_as_a_cold_start_takes() -> None:
    core = make_core(replicas=("decode-0",), config=CONFIG)
    core.models_held([M], {})
    core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
    assert submit(core, now_s=0.0) == []
    assert core.tick(59.9) == []
    error = only_reject(core.tick(60.0)).error
    assert isinstance(error, UnavailableError)
    assert (error.reason, error.retry_after_s) == (Reason.NO_REPLICA, 5.0)


def test_requests_for_a_model_that_is_held_no_more_wait_the_short_time() -> None:
    core = make_core(replicas=("decode-0",), config=CONFIG)
    core.models_held([M], {})
    core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
    submit(core, now_s=0.0)
    core.models_held([], {})
    assert core.tick(4.9) == []
    only_reject(core.tick(5.0))


def test_a_request_for_a_held_model_starts_with_its_first_replica() -> None:
    core = make_core(replicas=("decode-0",), config=CONFIG)
    core.models_held([M], {})
    core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
    submit(core, now_s=0.0)
    assert only_dispatch(core.replica_seen(make_lease("decode-1"), 30.0)).request_id == R1


def test_a_request_for_a_held_model_of_which_no_replica_was_ever_seen_is_not_queued() -> None:
    core = make_core(replicas=(), config=CONFIG)
    core.models_held([M], {})
    assert only_reject(submit(core)).error.reason is Reason.NO_REPLICA


def test_waiting_requests_of_a_model_that_cannot_start_end_with_the_reason_at_once() -> None:
    core = make_core(replicas=("decode-0",), config=CONFIG)
    core.models_held([M], {})
    core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
    assert submit(core, now_s=0.0) == []
    core.models_held([M], {M: "weights are missing"})
    error = only_reject(core.tick(0.1)).error
    assert isinstance(error, UnavailableError)
    assert "weights are missing" in error.message
    assert only_reject(submit(core, "r2", now_s=0.2)).error.message == error.message


def test_a_full_queue_for_a_model_at_zero_refuses_no_request_that_a_replica_could_take() -> None:
    config = RouterConfig(max_queued_requests=1, cold_start_wait_s=60.0, no_replica_wait_s=5.0)
    core = make_core(replicas=("decode-0", "prefill-0"), config=config)
    core.replica_seen(make_lease("other", model=ModelId("n")), 0.0)
    core.replica_lost(ReplicaId("other"), 1, 0.0)
    waiting = make_request("n1", model=ModelId("n"))
    assert core.submit(waiting, block_hashes=(), deadline_s=None, now_s=0.0) == []
    more = make_request("n2", model=ModelId("n"))
    error = only_reject(core.submit(more, block_hashes=(), deadline_s=None, now_s=0.0)).error
    assert (error.reason, error.retry_after_s) == (Reason.QUEUE_FULL, 5.0)
    core.models_held([ModelId("n")], {})
    error = only_reject(core.submit(more, block_hashes=(), deadline_s=None, now_s=0.0)).error
    assert (error.reason, error.retry_after_s) == (Reason.QUEUE_FULL, 60.0)
    assert only_dispatch(submit(core)).request_id == R1


def test_a_caller_who_names_no_known_model_may_come_back_soon() -> None:
    assert make_core().retry_after_s(None, 0.0) == pytest.approx(0.1)


def test_the_waiting_work_of_a_model_is_its_requests_and_their_prefill() -> None:
    core = make_core(replicas=("decode-0",), config=CONFIG)
    core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
    assert core.waiting_work() == {}
    submit(core, "r1", prompt_tokens=100)
    (requests, one_s) = core.waiting_work()[M]
    assert requests == 1
    assert one_s > 0.0
    submit(core, "r2", prompt_tokens=100)
    (requests, two_s) = core.waiting_work()[M]
    assert requests == 2
    assert two_s == pytest.approx(2 * one_s)
    core.cancelled(R1, 1.0)
    (requests, left_s) = core.waiting_work()[M]
    assert requests == 1
    assert left_s == pytest.approx(one_s)


def test_running_requests_are_no_waiting_work() -> None:
    core = make_core()
    only_dispatch(submit(core))
    assert core.waiting_work() == {}
