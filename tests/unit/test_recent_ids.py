"""Ids that were in use a moment ago."""

from router import recent_ids
from router.recent_ids import RecentIds
from tandem.domain import RequestId

A, B = RequestId("a"), RequestId("b")


def test_an_ended_id_is_known_by_its_last_attempt_for_the_settle_time() -> None:
    recent = RecentIds(5.0)
    recent.ended(A, 3, 0.0)
    recent.ended(B, 1, 2.0)
    recent.expire(4.9)
    assert (recent.last_attempt(A), recent.last_attempt(B)) == (3, 1)
    recent.expire(5.0)
    assert (recent.last_attempt(A), recent.last_attempt(B)) == (0, 1)
    recent.begun(B)
    recent.begun(B)
    assert len(recent) == 0
    recent.expire(9.0)


def test_beyond_its_bound_the_oldest_is_forgotten() -> None:
    recent = RecentIds(5.0)
    for number in range(recent_ids._MAX_IDS + 1):
        recent.ended(RequestId(str(number)), 1, 0.0)
    assert len(recent) == recent_ids._MAX_IDS
    assert recent.last_attempt(RequestId("0")) == 0
