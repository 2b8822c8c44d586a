"""What goes before the automatic rules: targets set by hand, missing data, starts that fail."""

from dataclasses import replace

import pytest

from autoscaler.config import ScalerConfig
from autoscaler.observation import PoolKey
from autoscaler.plan import DecisionReason
from tandem.domain import ReplicaTarget, Role
from tests.scaler_talk import DECODE, MODEL, STARTING, Scaler, by_hand, limits, replicas

P, D = Role.PREFILL, Role.DECODE


def test_a_target_set_by_hand_wins_over_missing_data_and_load() -> None:
    scaler = Scaler()
    scaler.see(replicas(3), replicas(3))
    plan = scaler.see(replicas(3), replicas(3, load=1.0), manual=[by_hand(D, 1, 30.0)], is_complete=False)
    assert (plan[D].replicas, plan[D].reason) == (1, DecisionReason.MANUAL)
    assert plan[D].detail == "1 set by hand for 30 s more"
    assert plan[D].may_stop
    assert plan[P].reason is DecisionReason.HOLD


@pytest.mark.parametrize(("count", "replicas_wanted"), [(0, 0), (99, 8)])
def test_a_target_set_by_hand_goes_from_zero_to_the_maximum(count: int, replicas_wanted: int) -> None:
    plan = Scaler().see(replicas(1), replicas(1), manual=[by_hand(D, count)])
    assert plan[D].replicas == replicas_wanted
    assert plan[D].detail == f"{count} set by hand until it is taken back"


def test_a_zero_set_by_hand_stays_under_demand_even_while_its_end_cannot_be_seen() -> None:
    scaler = Scaler(limits(P, low=0), limits(D, low=0))
    manual = [by_hand(P, 0), by_hand(D, 0)]
    assert scaler.see(queued=5, manual=manual)[D].replicas == 0
    plan = scaler.see(queued=5, is_complete=False)
    assert (plan[D].replicas, plan[D].reason) == (0, DecisionReason.HOLD)
    assert scaler.see(queued=5)[D].reason is DecisionReason.WAKE


@pytest.mark.parametrize("ended", [by_hand(D, -1), by_hand(D, 4, -0.1)])
def test_a_target_that_has_ended_says_nothing(ended: ReplicaTarget) -> None:
    plan = Scaler().see(replicas(1), replicas(1), manual=[ended])
    assert (plan[D].replicas, plan[D].reason) == (1, DecisionReason.ADOPTED)


def test_without_its_target_the_pool_goes_on_from_the_current_count() -> None:
    scaler = Scaler()
    scaler.see(replicas(1), replicas(1), manual=[by_hand(D, 6)])
    plan = scaler.see(replicas(1), [*replicas(2), *replicas(1, STARTING)])
    assert (plan[D].replicas, plan[D].reason) == (3, DecisionReason.ADOPTED)


@pytest.mark.parametrize("inherited", [0, 3])
def test_a_new_leader_goes_on_with_the_target_of_the_one_before(inherited: int) -> None:
    pools = [replace(limits(role, low=0), inherited_replicas=inherited) for role in (P, D)]
    plan = Scaler(*pools).see()
    assert [(plan[role].replicas, plan[role].reason) for role in (P, D)] == 2 * [(inherited, DecisionReason.ADOPTED)]


def test_missing_data_hold_every_pool() -> None:
    scaler = Scaler()
    scaler.see(replicas(2), replicas(3))
    plan = scaler.see(is_complete=False, work_s=100.0)
    assert [(plan[role].replicas, plan[role].reason, plan[role].may_stop) for role in (P, D)] == [
        (2, DecisionReason.HOLD, False),
        (3, DecisionReason.HOLD, False),
    ]


def test_before_anything_complete_was_seen_the_most_that_was_seen_is_held() -> None:
    scaler = Scaler()
    assert scaler.see(replicas(3), replicas(2), is_complete=False)[P].replicas == 3
    assert scaler.see(replicas(1), replicas(2), is_complete=False)[P].replicas == 3
    assert scaler.see(replicas(4), replicas(2))[P].replicas == 4


def test_an_empty_pool_gets_its_minimum_while_data_are_missing_and_its_initial_count_then() -> None:
    scaler = Scaler(limits(P), limits(D, initial=3))
    plan = scaler.see(is_complete=False)
    assert (plan[D].replicas, plan[D].reason) == (1, DecisionReason.HOLD)
    plan = scaler.see(replicas(1, STARTING), replicas(1, STARTING))
    assert [(plan[role].replicas, plan[role].reason) for role in (P, D)] == [(1, DecisionReason.ADOPTED), (3, DecisionReason.INITIAL)]


def test_visible_demand_wakes_a_pool_at_zero_though_data_are_missing() -> None:
    scaler = Scaler(limits(P, low=0), limits(D, low=0, initial=2))
    plan = scaler.see(queued=1, is_complete=False)
    assert [(plan[role].replicas, plan[role].reason) for role in (P, D)] == [(1, DecisionReason.WAKE), (2, DecisionReason.WAKE)]
    assert not plan[D].may_stop


def test_failing_starts_hold_the_pool_at_what_is_there() -> None:
    scaler = Scaler()
    scaler.see(replicas(1), replicas(1, load=1.0))
    scaler.core.starts_failed(DECODE, scaler.now_s + 4.0)
    plan = scaler.see(replicas(1), replicas(1, load=1.0))
    assert (plan[D].replicas, plan[D].reason, plan[D].may_stop) == (1, DecisionReason.BACKOFF, False)
    assert plan[D].detail == "replicas fail to start: 1 of 2, tried again in 1 s"
    plan = scaler.see(replicas(1), replicas(1, load=1.0))
    assert (plan[D].replicas, plan[D].reason) == (2, DecisionReason.RETRY)


def test_starts_that_fail_for_ever_are_tried_once_a_minute() -> None:
    scaler = Scaler(limits(P), limits(D, low=2, initial=2))
    tries = 0
    for _ in range(720):
        plan = scaler.see(replicas(1), after_s=1.0)
        if plan[D].replicas > plan[D].current:
            tries += 1
            scaler.core.starts_failed(DECODE, scaler.now_s)
    assert 12 <= tries <= 17


def test_failing_starts_hold_back_a_target_set_by_hand_too() -> None:
    scaler = Scaler()
    scaler.see(replicas(1), replicas(1))
    scaler.core.starts_failed(DECODE, scaler.now_s + 4.0)
    plan = scaler.see(replicas(1), replicas(1), manual=[by_hand(D, 3)])
    assert (plan[D].replicas, plan[D].reason) == (1, DecisionReason.BACKOFF)


def test_a_replica_that_becomes_ready_ends_the_back_off() -> None:
    scaler = Scaler(limits(P), limits(D, low=3, initial=3))
    scaler.see(replicas(1), replicas(1))
    scaler.core.starts_failed(DECODE, scaler.now_s)
    assert scaler.see(replicas(1), replicas(1), after_s=1.0)[D].reason is DecisionReason.BACKOFF
    assert scaler.see(replicas(1), replicas(2), after_s=0.5)[D].replicas == 3


def test_a_pool_that_is_complete_forgets_failures() -> None:
    scaler = Scaler(config=ScalerConfig(backoff_first_s=10.0))
    two, one = [by_hand(D, 2)], [by_hand(D, 1)]
    for _ in range(4):
        scaler.core.starts_failed(DECODE, scaler.now_s)
        scaler.see(replicas(1), replicas(1), manual=two, after_s=60.0)
    scaler.see(replicas(1), replicas(1), manual=one)
    scaler.core.starts_failed(DECODE, scaler.now_s)
    assert scaler.see(replicas(1), replicas(1), manual=two, after_s=9.0)[D].replicas == 1
    assert scaler.see(replicas(1), replicas(1), manual=two, after_s=1.0)[D].replicas == 2


def test_what_cannot_be_started_and_is_not_needed_is_given_up() -> None:
    scaler = Scaler(config=ScalerConfig(backoff_first_s=60.0))
    scaler.see(replicas(1), replicas(1, load=1.0))
    for _ in range(20):
        scaler.core.starts_failed(DECODE, scaler.now_s)
        plan = scaler.see(replicas(1), replicas(1, load=0.2))
    assert (plan[D].replicas, plan[D].reason) == (1, DecisionReason.STEADY)


def test_a_failure_in_one_model_leaves_others_alone() -> None:
    scaler = Scaler()
    scaler.core.starts_failed(PoolKey(model=MODEL, role=P), scaler.now_s)
    assert scaler.see(after_s=1.0)[D].replicas == 1
