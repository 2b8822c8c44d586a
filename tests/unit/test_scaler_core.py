"""The rules that keep a pool or let it grow: the first count, bounds, wake, backlog, load, queue."""

from dataclasses import replace

import pytest

from autoscaler.observation import Observation, PoolKey
from autoscaler.plan import DecisionReason
from tandem.domain import ModelId, Role
from tests.scaler_talk import DECODE, DRAINING, PREFILL, STARTING, Scaler, by_hand, limits, replicas

P, D = Role.PREFILL, Role.DECODE


def test_an_empty_cluster_gets_its_initial_replicas() -> None:
    plan = Scaler(limits(P, initial=2), limits(D, initial=3)).see()
    assert [(plan[role].replicas, plan[role].reason, plan[role].is_changed) for role in (P, D)] == [
        (2, DecisionReason.INITIAL, True),
        (3, DecisionReason.INITIAL, True),
    ]


def test_a_new_leader_goes_on_from_what_is_there() -> None:
    plan = Scaler().see(replicas(2), [*replicas(2), *replicas(1, STARTING), *replicas(1, DRAINING)])
    assert [(plan[role].replicas, plan[role].current, plan[role].reason) for role in (P, D)] == [
        (2, 2, DecisionReason.ADOPTED),
        (3, 3, DecisionReason.ADOPTED),
    ]
    assert not plan[D].is_changed


def test_what_is_there_is_brought_within_the_bounds() -> None:
    plan = Scaler(limits(P, low=3, initial=3), limits(D, high=2)).see(replicas(1), replicas(4))
    assert (plan[P].replicas, plan[P].reason) == (3, DecisionReason.MINIMUM)
    assert (plan[D].replicas, plan[D].reason) == (2, DecisionReason.MAXIMUM)


def test_a_replica_that_dies_leaves_the_target() -> None:
    scaler = Scaler()
    scaler.see(replicas(2), replicas(2))
    plan = scaler.see(replicas(2), replicas(1))
    assert (plan[D].replicas, plan[D].current, plan[D].reason, plan[D].is_changed) == (2, 1, DecisionReason.STEADY, False)


def test_decisions_come_by_model_and_role_and_name_their_pool() -> None:
    other = replace(limits(D), model=ModelId("a"))
    scaler = Scaler(limits(P), limits(D), other)
    plan = scaler.core.tick(Observation(), 0.0)
    assert [decision.key for decision in plan] == [other.key, DECODE, PREFILL]


def test_pools_that_are_not_configured_are_left_alone() -> None:
    scaler = Scaler(limits(D))
    scaler.core.starts_failed(PREFILL, 0.0)
    scaler.core.starts_failed(PoolKey(model=ModelId("other"), role=D), 0.0)
    plan = scaler.see(replicas(3), replicas(1), manual=[by_hand(P, 5)])
    assert plan.keys() == {D}


# Wake.


def test_demand_at_zero_wakes_both_pools_at_once() -> None:
    scaler = Scaler(limits(P, low=0, initial=0), limits(D, low=0, initial=0))
    assert scaler.see()[D].replicas == 0
    plan = scaler.see(work_s=0.5)
    assert (plan[D].replicas, plan[D].reason) == (1, DecisionReason.WAKE)
    assert plan[P].replicas == 0


def test_a_pool_that_wakes_is_not_sized_in_the_same_tick() -> None:
    scaler = Scaler(limits(D, low=0, initial=0))
    scaler.see()
    assert scaler.see(work_s=9.0)[D].replicas == 1


def test_a_pool_that_woke_to_many_may_double() -> None:
    scaler = Scaler(limits(P), limits(D, low=0, initial=3))
    scaler.see(replicas(1), manual=[by_hand(D, 0)])
    assert scaler.see(replicas(1), queued=1)[D].replicas == 3
    assert scaler.see(replicas(1), replicas(3, load=1.0), after_s=1.0)[D].replicas == 5


def test_growth_after_a_wake_is_counted_from_what_it_woke_to() -> None:
    scaler = Scaler(limits(P, low=0, initial=0), limits(D, low=0, initial=0))
    scaler.see()
    assert scaler.see(queued=1)[D].replicas == 1
    seen = [scaler.see([], replicas(4, load=1.0))[D].replicas for _ in range(7)]
    assert seen == [2, 2, 2, 2, 2, 2, 4]


def test_a_model_whose_replicas_all_died_comes_back_with_its_initial_count() -> None:
    scaler = Scaler(limits(P), limits(D, initial=3))
    scaler.see(replicas(1), replicas(1))
    assert scaler.see(queued=1)[D].replicas == 3
    assert scaler.see(queued=1)[P].reason is DecisionReason.STEADY


def test_a_model_that_cannot_be_woken_does_not_flap() -> None:
    scaler = Scaler(limits(P, low=0), limits(D, low=0, initial=2))
    assert {scaler.see(work_s=0.5)[D].replicas for _ in range(60)} == {2}


def test_a_model_with_prefill_replicas_only_is_woken_and_sized_by_both_kinds_of_work() -> None:
    scaler = Scaler(limits(P, low=0, initial=0), limits(D, low=0, high=0, initial=0))
    scaler.see()
    plan = scaler.see(queued=1)
    assert (plan[P].replicas, plan[D].replicas) == (1, 0)
    scaler.see(replicas(1), after_s=30.0)
    assert scaler.see(replicas(1, load=0.9, running=1))[P].reason is DecisionReason.LOAD


def test_a_model_with_decode_replicas_only_grows_with_its_backlog() -> None:
    plan = Scaler(limits(D)).see([], replicas(1, backlog_s=3.0))
    assert (plan[D].replicas, plan[D].reason) == (2, DecisionReason.BACKLOG)


# Backlog.


def test_prefill_is_sized_by_the_work_ahead() -> None:
    plan = Scaler().see(replicas(4, backlog_s=1.0), replicas(1), work_s=0.5)
    assert (plan[P].replicas, plan[P].reason) == (6, DecisionReason.BACKLOG)
    assert plan[P].detail == "4.5 s of prefill work ahead of 4 replicas, 6 needed"


def test_a_backlog_at_the_limit_is_let_be() -> None:
    assert Scaler().see(replicas(4, backlog_s=1.0), replicas(1))[P].replicas == 4


def test_a_pool_at_most_doubles_in_a_window() -> None:
    scaler = Scaler(limits(P, high=100), limits(D))
    seen = [scaler.see(replicas(3), replicas(1), work_s=1000.0)[P].replicas for _ in range(14)]
    assert seen == [6, 6, 6, 6, 6, 6, 12, 12, 12, 12, 12, 12, 24, 24]


def test_a_pool_stops_at_its_maximum() -> None:
    scaler = Scaler()
    seen = [scaler.see(replicas(3), replicas(1), work_s=1000.0, after_s=30.0)[P].replicas for _ in range(4)]
    assert seen == [6, 8, 8, 8]


def test_replicas_that_start_are_not_bought_twice() -> None:
    scaler = Scaler()
    seen = [scaler.see([*replicas(4, backlog_s=1.2), *replicas(2, STARTING)], replicas(1), after_s=30.0)[P].replicas for _ in range(3)]
    assert seen == [6, 6, 6]


def test_replicas_that_start_share_the_backlog() -> None:
    plan = Scaler().see([*replicas(4, backlog_s=1.2), *replicas(1, STARTING)], replicas(1))
    assert plan[P].replicas == 5


# Load and queue.


def test_decode_is_sized_to_its_target_load() -> None:
    plan = Scaler().see(replicas(1), replicas(3, load=0.9, running=4))
    assert (plan[D].replicas, plan[D].reason) == (5, DecisionReason.LOAD)


def test_a_load_that_fits_exactly_gets_no_replica_more() -> None:
    plan = Scaler(limits(P), limits(D, high=20)).see(replicas(1), replicas(6, load=0.9, running=4))
    assert plan[D].replicas == 9


def test_what_runs_on_draining_replicas_counts_as_load() -> None:
    plan = Scaler().see(replicas(1), [*replicas(1, load=0.7), *replicas(1, DRAINING, load=0.3)])
    assert (plan[D].replicas, plan[D].detail) == (2, "load of 1.00 replicas on 1, 2 needed")


def test_a_load_at_the_limit_is_let_be() -> None:
    assert Scaler().see(replicas(1), replicas(3, load=0.8, running=4))[D].replicas == 3


def test_a_queue_that_ready_replicas_leave_waiting_counts_as_load() -> None:
    plan = Scaler().see(replicas(1), replicas(2, load=0.5, running=5), queued=8)
    assert (plan[D].replicas, plan[D].reason) == (3, DecisionReason.QUEUE)
    assert plan[D].detail == "load of 1.00 replicas on 2, 8 requests queued, 3 needed"


def test_a_short_queue_before_half_empty_replicas_buys_nothing() -> None:
    assert Scaler().see(replicas(1), replicas(2, load=0.3, running=3), queued=1)[D].replicas == 2


@pytest.mark.parametrize(("queued", "wanted"), [(51, 1), (60, 2)])
def test_where_nothing_runs_a_queued_request_counts_as_configured(queued: int, wanted: int) -> None:
    assert Scaler().see(replicas(1), replicas(1), queued=queued)[D].replicas == wanted


def test_a_queue_with_known_work_is_the_prefill_pools() -> None:
    plan = Scaler().see(replicas(1), replicas(1), queued=500, work_s=0.5)
    assert (plan[P].replicas, plan[D].replicas) == (1, 1)


def test_what_a_queue_has_bought_is_kept_while_it_starts() -> None:
    scaler = Scaler()
    assert scaler.see(replicas(1), replicas(1), queued=60)[D].replicas == 2
    for _ in range(40):
        plan = scaler.see(replicas(1), [*replicas(1), *replicas(1, STARTING)], queued=60)
        assert plan[D].replicas == 2


def test_a_queue_buys_nothing_before_all_that_was_ordered_can_be_seen() -> None:
    scaler = Scaler()
    scaler.see(replicas(1), replicas(2))
    assert scaler.see(replicas(1), replicas(1), queued=200)[D].replicas == 2
