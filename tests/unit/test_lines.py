"""Everybody waits in one place: a worker's line, or without a worker."""

import pytest

from router.lines import Lines
from tandem.domain import ModelId, ReplicaId, RequestId
from tests.unit.test_line import waiting

M, N = ModelId("m"), ModelId("n")
P0, P1 = ReplicaId("p0"), ReplicaId("p1")


def lines_of(*places: tuple[str, ModelId, ReplicaId | None]) -> Lines:
    lines = Lines()
    for name, model, replica_id in places:
        lines.add(waiting(name), model, replica_id)
        lines.check_invariants()
    return lines


def test_only_workers_that_somebody_waits_for_have_a_line() -> None:
    lines = lines_of(("a", M, P0), ("b", M, P1), ("c", N, P0))
    assert (set(lines), len(lines), len(lines[P0])) == ({P0, P1}, 2, 2)
    lines.discard(RequestId("b"))
    lines.check_invariants()
    assert set(lines) == {P0}
    assert lines.get(P1) is None


def test_those_without_a_worker_are_kept_by_model_in_the_order_they_came() -> None:
    lines = lines_of(("b", N, None), ("a", N, None), ("c", M, None), ("d", M, P0))
    assert list(lines.homeless_models) == [M, N]
    assert (lines.homeless(N), lines.homeless(M), lines.homeless(ModelId("x"))) == (("b", "a"), ("c",), ())
    lines.discard(RequestId("c"))
    lines.discard(RequestId("b"))
    lines.check_invariants()
    assert list(lines.homeless_models) == [N]
    assert set(lines.requests) == {"a", "d"}


def test_giving_up_one_that_does_not_wait_is_no_harm() -> None:
    lines = lines_of(("a", M, P0))
    lines.discard(RequestId("a"))
    lines.discard(RequestId("a"))
    lines.check_invariants()
    assert len(lines) == 0


def test_waiting_in_two_places_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="a waits twice"):
        lines_of(("a", M, P0), ("a", M, None))
