"""The strictest TPOT objective of each replica's requests."""

from math import inf

import pytest

from router.objectives import Objectives
from tandem.domain import ReplicaId

A, B = ReplicaId("a"), ReplicaId("b")


def test_the_strictest_of_a_replica_holds_while_its_request_runs() -> None:
    objectives = Objectives()
    for tpot_s in (0.05, None, 0.02, 0.02):
        objectives.add(A, tpot_s)
    assert (objectives.tpot_s(A), objectives.tpot_s(B), len(objectives)) == (0.02, inf, 1)
    seen = []
    for tpot_s in (0.02, None, 0.02, 0.05):
        objectives.remove(A, tpot_s)
        seen.append(objectives.tpot_s(A))
    assert seen == [0.02, 0.02, 0.05, inf]
    assert len(objectives) == 0


def test_one_that_was_not_added_cannot_be_removed() -> None:
    with pytest.raises(KeyError):
        Objectives().remove(A, 0.05)
