"""Replicas in the order of a number, by pool."""

from router.load_order import LoadOrder
from tandem.domain import ReplicaId

A, B, C = (ReplicaId(name) for name in "abc")


def test_the_least_is_first_and_ties_go_by_id() -> None:
    order = LoadOrder()
    for replica_id, load in ((C, 1.0), (A, 2.0), (B, 1.0)):
        order.put(replica_id, "pool", load)
    assert list(order.least("pool")) == [B, C, A]
    assert list(order.least("another")) == []


def test_a_replica_has_one_place_the_last() -> None:
    order = LoadOrder()
    order.put(A, "pool", 1.0)
    order.put(B, "pool", 2.0)
    order.put(A, "pool", 1.0)
    order.put(A, "pool", 3.0)
    assert list(order.least("pool")) == [B, A]
    order.put(A, "another", 3.0)
    assert (list(order.least("pool")), list(order.least("another"))) == ([B], [A])


def test_one_that_is_dropped_is_nowhere_and_again_is_no_harm() -> None:
    order = LoadOrder()
    order.put(A, "pool", 1.0)
    order.put(B, "pool", 1.0)
    for _ in range(2):
        order.drop(A)
    assert list(order.least("pool")) == [B]
    order.drop(B)
    assert list(order.least("pool")) == []
