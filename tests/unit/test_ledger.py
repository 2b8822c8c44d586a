"""The ledger counts each request exactly once, whatever order the news of it comes in."""

import pytest

from router.ledger import Ledger, ReplicaLoad
from tandem.domain import ReplicaId, RequestId, Stamp, StampKind, WorkerLoad

REPLICA = ReplicaId("decode-0")
KEY = (RequestId("r1"), 1)
ACCEPTED = Stamp(request_id=RequestId("r1"), attempt=1, kind=StampKind.ACCEPTED)
FINISHED = Stamp(request_id=RequestId("r1"), attempt=1, kind=StampKind.FINISHED)
NOTHING = ReplicaLoad()
BOOKED = ReplicaLoad(pending_prefill_tokens=100, running_requests=1, kv_tokens=100)
OF_OTHERS = WorkerLoad(running_requests=3, waiting_requests=1, pending_prefill_tokens=50, kv_tokens=700)
OTHERS = ReplicaLoad(pending_prefill_tokens=50, running_requests=3, kv_tokens=700)
WITH_OURS = WorkerLoad(running_requests=4, waiting_requests=1, pending_prefill_tokens=150, kv_tokens=800)
ALL = ReplicaLoad(pending_prefill_tokens=150, running_requests=4, kv_tokens=800)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(settle_s=5.0)
    ledger.add_replica(REPLICA, 1)
    return ledger


def _book(ledger: Ledger) -> None:
    ledger.book(REPLICA, KEY, prefill_tokens=100, kv_tokens=100)


def _view(ledger: Ledger) -> ReplicaLoad:
    ledger.check_invariants()
    return ledger.view(REPLICA)


def test_a_dispatch_counts_at_once(ledger: Ledger) -> None:
    _book(ledger)
    assert _view(ledger) == BOOKED


def test_totals_without_the_request_are_added_to_it(ledger: Ledger) -> None:
    _book(ledger)
    assert ledger.report(REPLICA, 1, 1, OF_OTHERS)
    assert _view(ledger) == ALL


def test_totals_with_the_accepted_request_count_it_once(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, WITH_OURS, [ACCEPTED])
    assert _view(ledger) == ALL
    assert ledger.reported(REPLICA) == WITH_OURS


def test_a_request_that_ended_here_is_taken_off_totals_that_still_have_it(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, WITH_OURS, [ACCEPTED])
    ledger.release(REPLICA, KEY, 1.0)
    assert _view(ledger) == OTHERS
    ledger.report(REPLICA, 1, 2, OF_OTHERS, [FINISHED])
    assert _view(ledger) == OTHERS
    assert ledger.settling() == 0


def test_a_request_that_ended_there_first_is_not_taken_off_twice(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, OF_OTHERS, [ACCEPTED, FINISHED])
    assert _view(ledger) == OTHERS
    ledger.release(REPLICA, KEY, 1.0)
    assert _view(ledger) == OTHERS
    assert ledger.settling() == 0


def test_a_late_acceptance_of_a_released_request_is_taken_off(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, OF_OTHERS)
    ledger.release(REPLICA, KEY, 1.0)
    assert _view(ledger) == OTHERS
    ledger.report(REPLICA, 1, 2, WITH_OURS, [ACCEPTED])
    assert _view(ledger) == OTHERS
    ledger.report(REPLICA, 1, 3, OF_OTHERS, [FINISHED])
    assert _view(ledger) == OTHERS


def test_release_is_idempotent(ledger: Ledger) -> None:
    _book(ledger)
    ledger.release(REPLICA, KEY, 1.0)
    ledger.release(REPLICA, KEY, 2.0)
    assert _view(ledger) == NOTHING
    ledger.expire(6.0)
    assert ledger.settling() == 0
    ledger.release(REPLICA, KEY, 7.0)
    assert _view(ledger) == NOTHING


def test_a_stamp_that_never_comes_is_given_up_after_the_settle_time(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, WITH_OURS, [ACCEPTED])
    ledger.expire(100.0)
    assert ledger.open_bookings(REPLICA) == {KEY}
    ledger.release(REPLICA, KEY, 100.0)
    ledger.expire(104.9)
    assert ledger.settling() == 1
    ledger.expire(105.0)
    assert ledger.settling() == 0
    assert _view(ledger) == ALL  # the replica's word, from here on


def test_output_ends_the_prefill_and_grows_the_kv(ledger: Ledger) -> None:
    _book(ledger)
    ledger.add_output(REPLICA, KEY, 3)
    assert _view(ledger) == ReplicaLoad(running_requests=1, kv_tokens=103)
    ledger.add_output(REPLICA, KEY, 2)
    ledger.release(REPLICA, KEY, 1.0)
    assert _view(ledger) == NOTHING


def test_older_and_repeated_reports_are_dropped(ledger: Ledger) -> None:
    assert ledger.report(REPLICA, 1, 5, OF_OTHERS)
    assert not ledger.report(REPLICA, 1, 5, WorkerLoad())
    assert not ledger.report(REPLICA, 1, 4, WorkerLoad())
    assert _view(ledger) == OTHERS


def test_a_report_from_the_future_is_dropped_and_the_true_ones_after_it_are_not(ledger: Ledger) -> None:
    assert not ledger.report(REPLICA, 1, 2**63, WorkerLoad())
    assert ledger.report(REPLICA, 1, 5, OF_OTHERS)
    assert not ledger.report(REPLICA, 1, 1_000_006, WorkerLoad())
    assert _view(ledger) == OTHERS
    assert ledger.report(REPLICA, 1, 6, WorkerLoad())
    assert _view(ledger) == NOTHING


@pytest.mark.parametrize("first", [0, 1, 1_000_000])
def test_up_to_a_million_reports_may_have_been_lost(ledger: Ledger, first: int) -> None:
    assert ledger.report(REPLICA, 1, first, OF_OTHERS)
    assert ledger.report(REPLICA, 1, first + 1_000_000, WorkerLoad())


def test_a_stream_that_begins_again_counts_from_its_start(ledger: Ledger) -> None:
    assert ledger.report(REPLICA, 1, 900, WorkerLoad())
    ledger.remove_replica(REPLICA)
    ledger.add_replica(REPLICA, 1)
    assert ledger.report(REPLICA, 1, 0, OF_OTHERS)
    assert _view(ledger) == OTHERS


def test_another_incarnation_is_not_believed(ledger: Ledger) -> None:
    _book(ledger)
    ledger.add_replica(REPLICA, 2)
    assert _view(ledger) == NOTHING
    assert not ledger.report(REPLICA, 1, 9, OF_OTHERS)
    assert ledger.report(REPLICA, 2, 1, OF_OTHERS)
    assert _view(ledger) == OTHERS


def test_a_report_without_totals_keeps_the_last_ones(ledger: Ledger) -> None:
    ledger.report(REPLICA, 1, 1, OF_OTHERS)
    assert ledger.report(REPLICA, 1, 2, None)
    assert _view(ledger) == OTHERS


def test_stamps_of_requests_it_does_not_know_are_ignored(ledger: Ledger) -> None:
    assert ledger.report(REPLICA, 1, 1, OF_OTHERS, [ACCEPTED, FINISHED])
    assert _view(ledger) == OTHERS


def test_an_unknown_replica_is_ignored_until_it_is_booked_on() -> None:
    ledger = Ledger(settle_s=5.0)
    assert not ledger.report(REPLICA, 1, 1, OF_OTHERS)
    ledger.add_output(REPLICA, KEY, 1)
    ledger.release(REPLICA, KEY, 1.0)
    ledger.remove_replica(REPLICA)
    with pytest.raises(KeyError):
        _book(ledger)


def test_booking_twice_is_a_bug(ledger: Ledger) -> None:
    _book(ledger)
    with pytest.raises(AssertionError, match="booked twice"):
        _book(ledger)


def test_a_key_may_be_booked_again_once_it_is_released(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, WITH_OURS, [ACCEPTED])
    ledger.release(REPLICA, KEY, 1.0)
    _book(ledger)
    assert _view(ledger).running_requests == 5
    assert ledger.settling() == 0


def test_a_removed_replica_takes_its_bookings_along(ledger: Ledger) -> None:
    _book(ledger)
    ledger.remove_replica(REPLICA)
    ledger.add_replica(REPLICA, 1)
    assert _view(ledger) == NOTHING
    assert ledger.open_bookings(REPLICA) == set()


def test_a_lost_acceptance_is_inferred_from_output_before_the_gap(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, OF_OTHERS)
    ledger.add_output(REPLICA, KEY, 0)
    ledger.report(REPLICA, 1, 3, WITH_OURS)  # 2 was lost, and the stamp with it
    assert _view(ledger) == ALL


def test_a_lost_acceptance_is_inferred_from_output_after_the_gap(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, OF_OTHERS)
    ledger.report(REPLICA, 1, 3, WITH_OURS)
    assert _view(ledger).running_requests == 5  # one too many, until there is output
    ledger.add_output(REPLICA, KEY, 1)
    assert _view(ledger).running_requests == 4


def test_after_a_gap_what_was_released_is_no_longer_taken_off(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, WITH_OURS, [ACCEPTED])
    ledger.release(REPLICA, KEY, 1.0)
    ledger.report(REPLICA, 1, 3, OF_OTHERS)
    assert _view(ledger) == OTHERS
    assert ledger.settling() == 0


def test_nothing_is_shown_below_zero(ledger: Ledger) -> None:
    _book(ledger)
    ledger.report(REPLICA, 1, 1, WorkerLoad(), [ACCEPTED])
    ledger.release(REPLICA, KEY, 1.0)
    assert _view(ledger) == NOTHING


def test_a_wrong_sum_is_noticed(ledger: Ledger) -> None:
    _book(ledger)
    ledger._accounts[REPLICA].requests = 7
    with pytest.raises(AssertionError, match="not the sum"):
        ledger.check_invariants()
