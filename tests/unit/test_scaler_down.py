"""The rules that take replicas away: surplus and idleness, and what holds them back."""

import pytest

from autoscaler.config import ScalerConfig
from autoscaler.plan import DecisionReason
from tandem.domain import Role
from tests.scaler_talk import Scaler, by_hand, limits, replicas

P, D = Role.PREFILL, Role.DECODE


def test_a_surplus_goes_after_a_whole_window_and_one_at_a_time() -> None:
    scaler = Scaler()
    seen, count, changes = [], 4, []
    for tick in range(40):
        decision = scaler.see(replicas(1), replicas(count, running=1))[D]
        seen.append(decision.replicas)
        count = decision.replicas
        if decision.is_changed:
            changes.append((tick, decision.reason))
    assert seen[-1] == 1
    # 60 s after the first tick, then every 15 s.
    assert changes == [(tick, DecisionReason.SURPLUS) for tick in (12, 15, 18)]


def test_the_largest_need_of_the_window_counts() -> None:
    scaler = Scaler()
    for tick in range(30):
        load = 0.5 if tick % 10 == 0 else 0.0
        assert scaler.see(replicas(1), replicas(3, load=load, running=1))[D].replicas == 3


def test_a_surplus_stays_while_the_survivors_would_be_too_full() -> None:
    scaler = Scaler()
    # Two replicas' worth of room for 1.05 of load: but the fuller one would have 0.8 * 3 / 2.
    pool = [*replicas(2, load=0.1, running=1), *[replica for replica in replicas(3, load=0.8, running=9)][2:]]
    for _ in range(30):
        assert scaler.see(replicas(1), pool)[D].replicas == 3


def test_missing_data_begin_the_window_anew() -> None:
    scaler = Scaler()
    for _ in range(12):
        scaler.see(replicas(1), replicas(2, running=1))
    scaler.see(replicas(1), replicas(2, running=1), is_complete=False)
    seen = [scaler.see(replicas(1), replicas(2, running=1))[D].replicas for _ in range(14)]
    assert seen == [2] * 12 + [1, 1]


@pytest.mark.parametrize("high", [8, 1])
def test_no_pool_shrinks_while_another_of_its_model_grows_or_should_and_cannot(high: int) -> None:
    scaler = Scaler(limits(P, high=high), limits(D))
    for _ in range(12):
        scaler.see(replicas(1), replicas(3, running=1))
    count = 1
    for _ in range(20):
        plan = scaler.see(replicas(count, backlog_s=5.0), replicas(3, running=1))
        count = plan[P].replicas
        assert plan[D].replicas == 3
    assert count == high


def test_a_tenth_of_a_large_pool_goes_at_once() -> None:
    scaler = Scaler(limits(P), limits(D, high=100))
    for _ in range(12):
        scaler.see(replicas(1), replicas(40, running=1))
    assert scaler.see(replicas(1), replicas(40, running=1))[D].replicas == 36


def test_a_surplus_ends_at_the_minimum() -> None:
    scaler = Scaler(limits(P), limits(D, low=2, initial=2))
    count = 3
    for _ in range(40):
        count = scaler.see(replicas(1), replicas(count))[D].replicas
    assert count == 2


def test_a_target_set_by_hand_is_no_surplus() -> None:
    scaler = Scaler()
    for _ in range(40):
        plan = scaler.see(replicas(1), replicas(4), manual=[by_hand(D, 4)])
    assert (plan[D].replicas, plan[D].reason) == (4, DecisionReason.MANUAL)


def test_an_idle_model_goes_to_zero_with_both_pools_together() -> None:
    scaler = Scaler(limits(P, low=0, initial=2), limits(D, low=0))
    plans = [scaler.see(replicas(2), replicas(1)) for _ in range(25)]
    assert [plan[D].replicas for plan in plans] == [1] * 24 + [0]
    assert (plans[-1][P].replicas, plans[-1][P].reason) == (0, DecisionReason.IDLE)
    assert plans[-1][D].detail == "no request for 120 s"
    assert scaler.see()[D].reason is DecisionReason.STEADY


@pytest.mark.parametrize("sign", ["running", "queued", "recent", "backlog", "missing"])
def test_any_sign_of_use_keeps_a_model_awake(sign: str) -> None:
    scaler = Scaler(limits(P, low=0), limits(D, low=0))
    for tick in range(60):
        is_used = tick % 20 == 0
        plan = scaler.see(
            replicas(1, backlog_s=0.1 if is_used and sign == "backlog" else 0.0),
            replicas(1, running=1 if is_used and sign == "running" else 0),
            queued=1 if is_used and sign == "queued" else 0,
            recent=1 if is_used and sign == "recent" else 0,
            is_complete=not (is_used and sign == "missing"),
        )
        assert (plan[P].replicas, plan[D].replicas) == (1, 1)


@pytest.mark.parametrize("low", [0, 1])
def test_a_pool_that_may_not_go_to_zero_keeps_the_other(low: int) -> None:
    scaler = Scaler(limits(P, low=0), limits(D, low=low))
    for _ in range(40):
        plan = scaler.see(replicas(1), replicas(1), manual=[] if low else [by_hand(D, 1)])
    assert (plan[P].replicas, plan[D].replicas) == (1, 1)


def test_a_zero_set_by_hand_does_not_keep_the_other_pool_awake() -> None:
    scaler = Scaler(limits(P), limits(D, low=0))
    for _ in range(40):
        plan = scaler.see([], replicas(1), manual=[by_hand(P, 0)])
    assert (plan[P].reason, plan[D].replicas) == (DecisionReason.MANUAL, 0)


def test_a_change_is_left_to_cool_down() -> None:
    scaler = Scaler(config=ScalerConfig(cooldown_s=100.0))
    count, changes = 4, []
    for tick in range(70):
        decision = scaler.see(replicas(1), replicas(count))[D]
        count = decision.replicas
        if decision.is_changed:
            changes.append(tick)
    assert changes == [20, 40, 60]
