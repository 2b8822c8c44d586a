"""Who is next in one worker's line: by class, in time before late, by tenants' shares, by latest start."""

import pytest

from router.line import Line, Waiting
from tandem.domain import RequestId
from tests.router_parts import FixedShares

FAIR = FixedShares()


def waiting(
    name: str,
    latest_start_s: float = 10.0,
    *,
    tenant: str = "t",
    priority: int = 0,
    arrival: int = 1,
    rank_s: float | None = None,
    work_s: float = 1.0,
    has_objective: bool = True,
) -> Waiting:
    return Waiting(
        request_id=RequestId(name),
        tenant=tenant,
        priority=priority,
        arrival=arrival,
        latest_start_s=latest_start_s,
        rank_s=latest_start_s if rank_s is None else rank_s,
        work_s=work_s,
        tokens=10,
        has_objective=has_objective,
    )


def line_of(*waits: Waiting) -> Line:
    line = Line()
    for one in waits:
        line.add(one)
        line.check_invariants()
    return line


def order(line: Line, now_s: float = 0.0, shares: FixedShares = FAIR) -> list[str]:
    """All of them, each taken when it is its turn."""
    names = []
    while (first := line.first(now_s, shares)) is not None:
        names.append(str(line.remove(first.request_id).request_id))
        line.check_invariants()
    return names


def test_nobody_is_first_where_nobody_waits() -> None:
    assert line_of().first(0.0, FAIR) is None


def test_the_latest_start_decides_within_a_class() -> None:
    assert order(line_of(waiting("a", 3.0), waiting("b", 1.0), waiting("c", 2.0))) == ["b", "c", "a"]


def test_a_lower_class_number_goes_first_however_late_it_is() -> None:
    assert order(line_of(waiting("a", 1.0), waiting("b", 9.0, priority=-1), waiting("c", 0.1, priority=1)), 5.0) == ["b", "a", "c"]


def test_equal_starts_go_by_arrival_and_then_by_id() -> None:
    line = line_of(waiting("b", arrival=2), waiting("c", arrival=1), waiting("a", arrival=2))
    assert order(line) == ["c", "a", "b"]


def test_who_can_still_start_in_time_goes_before_who_is_late() -> None:
    line = line_of(waiting("late", 1.0), waiting("later", 0.5), waiting("soon", 2.0), waiting("far", 9.0))
    assert order(line, 1.5) == ["soon", "far", "later", "late"]


def test_one_that_must_start_just_now_is_in_time() -> None:
    assert order(line_of(waiting("late", 1.0), waiting("now", 2.0)), 2.0) == ["now", "late"]


def test_tenants_go_by_their_shares_and_not_by_their_requests() -> None:
    line = line_of(waiting("a", 1.0, tenant="much"), waiting("b", 5.0, tenant="little"))
    assert order(line, shares=FixedShares("little", "much")) == ["b", "a"]


def test_a_tenants_turn_passes_to_the_next_where_all_of_its_own_are_late() -> None:
    line = line_of(waiting("a", 1.0, tenant="first"), waiting("b", 5.0, tenant="second"))
    assert order(line, 2.0, FixedShares("first", "second")) == ["b", "a"]


def test_where_all_are_late_the_shares_decide_and_then_the_earliest() -> None:
    line = line_of(waiting("a", 1.0, tenant="x"), waiting("b", 0.9, tenant="y"), waiting("c", 0.5, tenant="x"))
    assert order(line, 9.0, FixedShares("x", "y")) == ["c", "a", "b"]


def test_ranked_by_anything_else_nobody_counts_as_late() -> None:
    line = line_of(waiting("long", 1.0, rank_s=5.0), waiting("short", 0.5, rank_s=0.2))
    assert order(line, 9.0) == ["short", "long"]


def test_one_without_an_objective_of_its_own_is_never_late_and_keeps_its_place() -> None:
    line = line_of(
        waiting("late", 1.0), waiting("open", 2.0, has_objective=False), waiting("soon", 9.5), waiting("far", 30.0, has_objective=False)
    )
    assert order(line, 9.0) == ["open", "soon", "far", "late"]


def test_a_backlog_without_objectives_is_shared_however_long_it_waits() -> None:
    line = line_of(
        waiting("a", 1.0, tenant="much", has_objective=False),
        waiting("b", 99.0, tenant="much", has_objective=False),
        waiting("c", 2.0, tenant="little", has_objective=False),
    )
    assert order(line, 50.0, FixedShares("little", "much")) == ["c", "a", "b"]


def test_counts_and_sums_are_of_those_who_wait() -> None:
    line = line_of(waiting("a", work_s=0.5), waiting("b", work_s=0.25, priority=1), waiting("c", work_s=2.0, priority=-1))
    assert (len(line), line.tokens, line.work_s) == (3, 30, 2.75)
    assert [line.work_before_s(priority, "t", 1.0, FAIR) for priority in (-2, -1, 0, 1)] == [0.0, 2.0, 2.5, 2.75]
    assert RequestId("a") in line
    assert line.remove(RequestId("a")).work_s == 0.5
    assert RequestId("a") not in line
    assert [one.request_id for one in line] == ["b", "c"]
    assert line.work_before_s(0, "t", 1.0, FAIR) == 2.0


def test_of_other_tenants_as_much_is_before_a_newcomer_as_their_weights_say() -> None:
    line = line_of(
        waiting("a", tenant="t", work_s=2.0),
        waiting("b", tenant="heavy", work_s=8.0),
        waiting("c", tenant="light", work_s=8.0),
        waiting("d", tenant="light", work_s=5.0, priority=1),
    )
    assert line.work_before_s(0, "t", 0.5, FAIR) == 2.0 + 7.5 + 2.5
    assert line.work_before_s(0, "heavy", 1.0, FAIR) == 8.0 + 2.0 + 3.0  # no more than is there of the first
    assert line.work_before_s(0, "new", 1.0, FAIR) == 1.0 + 3.0 + 1.0
    assert line.work_before_s(1, "light", 1.0, FAIR) == 18.0 + 5.0
    assert line.work_before_s(-1, "new", 1.0, FAIR) == 0.0


def test_of_very_many_tenants_all_work_counts() -> None:
    line = line_of(*(waiting(f"r{number}", tenant=f"t{number}", work_s=1.0) for number in range(17)))
    assert line.work_before_s(0, "t0", 1.0, FAIR) == line.work_s == 17.0
    line.remove(RequestId("r16"))
    assert line.work_before_s(0, "t0", 0.0, FAIR) == 16.0
    assert line.work_before_s(0, "new", 0.25, FAIR) == 4.0


def test_giving_up_one_that_is_not_there_is_a_bug() -> None:
    with pytest.raises(KeyError):
        line_of().remove(RequestId("a"))


def test_taking_one_twice_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="a waits twice"):
        line_of(waiting("a"), waiting("a"))
