"""Seconds of prefill in front of a new prompt: what was sent, less what has passed of the first."""

import pytest

from router.backlog import Backlog
from tandem.domain import ReplicaId, RequestId

P0 = ReplicaId("p0")
A, B = (RequestId("a"), 1), (RequestId("b"), 1)


def backlog_of(*prompts: tuple[tuple[RequestId, int], float]) -> Backlog:
    backlog = Backlog()
    backlog.add_replica(P0)
    for key, work_s in prompts:
        backlog.start(P0, key, work_s=work_s, tokens=100, now_s=1.0)
        backlog.check_invariants()
    return backlog


def test_an_idle_worker_has_nothing_ahead() -> None:
    backlog = backlog_of()
    assert (backlog.ahead_s(P0, 5.0), backlog.tokens(P0), backlog.free_at_s(P0)) == (0.0, 0, 0.0)


def test_what_was_sent_is_ahead_and_the_first_passes_with_time() -> None:
    backlog = backlog_of((A, 1.0), (B, 2.0))
    assert (backlog.ahead_s(P0, 1.0), backlog.tokens(P0), backlog.free_at_s(P0)) == (3.0, 200, 4.0)
    assert backlog.ahead_s(P0, 1.5) == 2.5


def test_a_tenth_of_a_prompt_that_takes_longer_is_always_thought_to_be_left() -> None:
    assert backlog_of((A, 1.0), (B, 2.0)).ahead_s(P0, 99.0) == pytest.approx(2.1)


def test_a_clock_that_is_behind_adds_nothing() -> None:
    assert backlog_of((A, 1.0)).ahead_s(P0, 0.0) == 1.0


def test_the_next_begins_when_the_first_ends() -> None:
    backlog = backlog_of((A, 1.0), (B, 2.0))
    backlog.end(P0, A, 3.0)
    backlog.check_invariants()
    assert (backlog.ahead_s(P0, 3.5), backlog.tokens(P0), backlog.free_at_s(P0)) == (1.5, 100, 5.0)


def test_one_that_is_given_up_behind_the_first_leaves_the_first_as_far_as_it_is() -> None:
    backlog = backlog_of((A, 1.0), (B, 2.0))
    backlog.end(P0, B, 1.5)
    assert backlog.ahead_s(P0, 1.5) == 0.5


def test_an_idle_worker_begins_a_prompt_when_it_comes() -> None:
    backlog = backlog_of((A, 1.0))
    backlog.end(P0, A, 2.0)
    assert backlog.ahead_s(P0, 9.0) == 0.0
    backlog.start(P0, B, work_s=1.0, tokens=5, now_s=9.0)
    assert backlog.ahead_s(P0, 9.25) == 0.75


def test_ending_again_is_no_harm() -> None:
    backlog = backlog_of((A, 1.0), (B, 2.0))
    backlog.end(P0, B, 1.0)
    backlog.end(P0, B, 1.0)
    assert backlog.ahead_s(P0, 1.0) == 1.0


def test_what_needs_no_computing_is_no_work() -> None:
    backlog = backlog_of()
    backlog.start(P0, A, work_s=1.0, tokens=0, now_s=1.0)
    assert backlog.ahead_s(P0, 1.0) == 0.0


def test_a_worker_that_is_not_known_is_ignored() -> None:
    backlog = backlog_of((A, 1.0))
    backlog.remove_replica(P0)
    backlog.remove_replica(P0)
    backlog.start(P0, B, work_s=1.0, tokens=5, now_s=1.0)
    backlog.end(P0, B, 1.0)
    assert (backlog.ahead_s(P0, 1.0), backlog.tokens(P0), backlog.free_at_s(P0)) == (0.0, 0, 0.0)


def test_a_replica_that_comes_again_starts_with_nothing() -> None:
    backlog = backlog_of((A, 1.0))
    backlog.add_replica(P0)
    assert backlog.ahead_s(P0, 1.0) == 0.0


def test_sending_one_twice_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="sent twice"):
        backlog_of((A, 1.0), (A, 1.0))
