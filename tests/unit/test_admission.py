"""Admission keeps its bounds and its order."""

import pytest

from router.admission import Admission
from tandem.domain import RequestId
from tandem.errors import DeadlineError, OverloadedError

A, B, C, D = (RequestId(name) for name in "abcd")


def _admission(max_queued: int = 3, max_running: int = 2) -> Admission:
    return Admission(max_queued_requests=max_queued, max_running_requests=max_running)


def _enqueue(admission: Admission, *request_ids: RequestId, priority: int = 0, deadline_s: float | None = None) -> None:
    for request_id in request_ids:
        admission.enqueue(request_id, priority=priority, deadline_s=deadline_s, now_s=0.0, retry_after_s=1.5)
        admission.check_invariants()


def test_equal_priorities_wait_in_order_of_arrival() -> None:
    admission = _admission()
    _enqueue(admission, C, A, B)
    assert admission.waiting() == (C, A, B)
    assert (admission.queued_requests, admission.running_requests) == (3, 0)


def test_a_lower_number_goes_first() -> None:
    admission = _admission()
    _enqueue(admission, A)
    _enqueue(admission, B, priority=-1)
    _enqueue(admission, C, priority=1)
    assert admission.waiting() == (B, A, C)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    admission = _admission(max_queued=1)
    _enqueue(admission, A)
    with pytest.raises(OverloadedError, match="max_queued_requests=1") as caught:
        _enqueue(admission, B)
    assert caught.value.retry_after_s == 1.5
    assert admission.waiting() == (A,)


def test_a_request_whose_time_is_over_is_refused() -> None:
    with pytest.raises(DeadlineError):
        _enqueue(_admission(), A, deadline_s=0.0)


def test_slots_are_taken_and_given_back() -> None:
    admission = _admission()
    _enqueue(admission, A, B, C)
    admission.start(A)
    assert admission.has_slot
    admission.start(B)
    assert not admission.has_slot
    assert admission.waiting() == (C,)
    admission.end(A)
    assert admission.has_slot
    admission.end(C)
    admission.end(B)
    admission.check_invariants()
    assert (admission.queued_requests, admission.running_requests) == (0, 0)


def test_a_retried_request_waits_at_its_old_rank_even_where_the_queue_is_full() -> None:
    admission = _admission(max_queued=1, max_running=1)
    _enqueue(admission, A)
    admission.start(A)
    _enqueue(admission, B)
    admission.wait_again(A)
    admission.check_invariants()
    assert admission.waiting() == (A, B)


def test_expired_requests_are_named_while_they_wait() -> None:
    admission = _admission()
    _enqueue(admission, A, deadline_s=1.0)
    _enqueue(admission, B, deadline_s=2.0)
    _enqueue(admission, C)
    admission.start(B)
    assert admission.expired(0.5) == []
    assert admission.expired(2.0) == [A]


def test_starting_what_does_not_wait_is_a_bug() -> None:
    admission = _admission()
    _enqueue(admission, A)
    admission.start(A)
    with pytest.raises(ValueError, match="not in list"):
        admission.start(A)
