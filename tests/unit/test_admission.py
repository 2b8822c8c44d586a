"""Admission keeps its bounds, its deadlines and its sums."""

import pytest

from router.admission import Admission
from tandem.domain import ModelId, RequestId
from tandem.errors import DeadlineError, OverloadedError

A, B, C = (RequestId(name) for name in "abc")
M, N = ModelId("m"), ModelId("n")


def _admission(max_queued: int = 3, max_running: int = 2) -> Admission:
    return Admission(max_queued_requests=max_queued, max_running_requests=max_running)


def _enqueue(
    admission: Admission,
    *request_ids: RequestId,
    model: ModelId = M,
    deadline_s: float | None = None,
    now_s: float = 0.0,
    work_s: float = 0.25,
) -> None:
    for request_id in request_ids:
        admission.check_room(model, deadline_s=deadline_s, now_s=now_s, retry_after_s=lambda: 1.5)
        admission.enqueue(request_id, model=model, deadline_s=deadline_s, now_s=now_s, work_s=work_s)
        admission.check_invariants()


def test_those_who_wait_and_those_who_run_are_counted() -> None:
    admission = _admission()
    _enqueue(admission, C, A, B)
    assert (admission.queued_requests, admission.running_requests) == (3, 0)
    admission.start(A)
    assert (admission.queued_requests, admission.running_requests) == (2, 1)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    admission = _admission(max_queued=1)
    _enqueue(admission, A)
    with pytest.raises(OverloadedError, match="max_queued_requests=1") as caught:
        _enqueue(admission, B)
    assert caught.value.retry_after_s == 1.5
    assert admission.queued_requests == 1


def test_what_was_not_asked_for_room_is_not_refused() -> None:
    admission = _admission(max_queued=1)
    _enqueue(admission, A)
    admission.enqueue(B, model=M, deadline_s=None, now_s=0.0, work_s=0.25)
    admission.check_invariants()
    assert admission.queued_requests == 2


def test_a_request_whose_time_is_over_is_refused() -> None:
    with pytest.raises(DeadlineError):
        _enqueue(_admission(), A, deadline_s=0.0)
    _enqueue(_admission(), A, deadline_s=0.1)


def test_slots_are_taken_and_given_back() -> None:
    admission = _admission()
    _enqueue(admission, A, B, C)
    admission.start(A)
    assert admission.has_slot
    admission.start(B)
    assert not admission.has_slot
    assert admission.queued_for(M) == (1, 0.25)
    admission.end(A)
    assert admission.has_slot
    admission.end(C)
    admission.end(B)
    admission.check_invariants()
    assert (admission.queued_requests, admission.running_requests) == (0, 0)


def test_a_retried_request_waits_again_even_where_the_queue_is_full() -> None:
    admission = _admission(max_queued=1, max_running=1)
    _enqueue(admission, A)
    admission.start(A)
    _enqueue(admission, B)
    admission.wait_again(A, now_s=1.0, work_s=0.5)
    admission.check_invariants()
    assert admission.waiting_since(M, 1.0) == (B, A)


def test_expired_requests_are_named_while_they_wait() -> None:
    admission = _admission()
    _enqueue(admission, A, deadline_s=1.0)
    _enqueue(admission, B, deadline_s=2.0)
    _enqueue(admission, C)
    admission.start(B)
    assert admission.expired(0.5) == ()
    assert admission.expired(2.0) == (A,)


def test_starting_what_does_not_wait_is_a_bug() -> None:
    admission = _admission()
    _enqueue(admission, A)
    admission.start(A)
    with pytest.raises(ValueError, match="a does not wait"):
        admission.start(A)


def test_a_full_line_for_one_model_refuses_nobody_who_wants_another() -> None:
    admission = _admission(max_queued=1)
    _enqueue(admission, A)
    _enqueue(admission, B, model=N)
    with pytest.raises(OverloadedError, match="1 requests wait for model 'm' already"):
        _enqueue(admission, C)
    assert admission.models == (M, N)
    assert admission.queued_requests == 2


def test_the_work_that_waits_is_summed_for_each_model() -> None:
    admission = _admission()
    _enqueue(admission, A, B)
    _enqueue(admission, C, model=N, work_s=2.0)
    assert (admission.queued_for(M), admission.queued_for(N)) == ((2, 0.5), (1, 2.0))
    admission.start(A)
    admission.end(C)
    admission.check_invariants()
    assert (admission.queued_for(M), admission.queued_for(N)) == ((1, 0.25), (0, 0.0))
    admission.wait_again(A, now_s=1.0, work_s=0.5)
    admission.check_invariants()
    assert admission.queued_for(M) == (2, 0.75)


def test_those_who_wait_for_long_are_named_the_longest_first() -> None:
    admission = _admission()
    _enqueue(admission, B, now_s=1.0)
    _enqueue(admission, A, now_s=2.0)
    _enqueue(admission, C, now_s=3.0)
    assert admission.waiting_since(M, 2.0) == (B, A)
    assert admission.waiting_since(N, 2.0) == ()
    admission.start(B)
    admission.wait_again(B, now_s=4.0, work_s=0.0)
    assert admission.waiting_since(M, 3.5) == (A, C)
