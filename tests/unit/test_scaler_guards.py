"""Windows, back-off and the consolidation check; who goes first."""

import pytest

from autoscaler.config import ScalerConfig
from autoscaler.guards import BackOff, WindowExtreme, survivors_cope
from autoscaler.observation import ModelDemand, ReplicaObservation
from autoscaler.plan import choose_victims
from autoscaler.sizing import view_pool
from tests.scaler_talk import DRAINING, MODEL, STARTING, replica, replicas

CONFIG = ScalerConfig()


def test_a_window_answers_the_largest_of_its_time() -> None:
    window = WindowExtreme(60.0, max)
    assert [window.add(count, now_s) for now_s, count in ((0.0, 3), (10.0, 5), (20.0, 2), (30.0, 4))] == [3, 5, 5, 5]


def test_a_window_answers_the_smallest_of_its_time() -> None:
    window = WindowExtreme(60.0, min)
    assert [window.add(count, now_s) for now_s, count in ((0.0, 3), (10.0, 5), (20.0, 2), (30.0, 4))] == [3, 3, 2, 2]


def test_a_count_is_in_force_until_the_next_one() -> None:
    window = WindowExtreme(60.0, max)
    window.add(5, 0.0)
    window.add(1, 100.0)
    assert window.add(1, 159.0) == 5
    assert window.add(1, 160.0) == 1


def test_a_window_keeps_no_more_entries_than_counts() -> None:
    window = WindowExtreme(60.0, max)
    for number in range(10_000):
        window.add(number % 7, number * 1e-3)
    assert len(window._entries) <= 7


def test_the_back_off_doubles_up_to_its_bound() -> None:
    back_off = BackOff(2.0, 60.0)
    waits, now_s = [], 0.0
    for _ in range(7):
        back_off.failed(now_s)
        waits.append(back_off.left_s(now_s))
        now_s += waits[-1]
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_failures_of_one_attempt_count_once() -> None:
    back_off = BackOff(2.0, 60.0)
    for now_s in (0.0, 0.0, 1.0):
        back_off.failed(now_s)
    assert back_off.left_s(1.0) == 1.0
    assert back_off.left_s(2.0) <= 0.0


def test_after_a_success_the_next_failure_is_the_first() -> None:
    back_off = BackOff(2.0, 60.0)
    assert back_off.left_s(0.0) <= 0.0
    back_off.failed(0.0)
    back_off.failed(2.0)
    back_off.succeeded()
    assert back_off.left_s(3.0) <= 0.0
    back_off.failed(3.0)
    assert back_off.left_s(3.0) == 2.0


def _cope(pool: list[ReplicaObservation], wanted: int, target: int, work_s: float = 0.0) -> bool:
    demand = ModelDemand(model=MODEL, queued_work_s=work_s)
    view = view_pool(pool, demand, takes_prompts=True, generates=True, is_work_known=True)
    return survivors_cope(view, wanted=wanted, replicas=target, config=CONFIG)


@pytest.mark.parametrize(
    ("pool", "work_s", "copes"),
    [
        (replicas(2, load=0.32), 0.0, True),
        (replicas(2, load=0.33), 0.0, False),
        (replicas(2, backlog_s=0.4), 0.0, True),
        (replicas(2, backlog_s=0.41), 0.0, False),
        (replicas(2, backlog_s=0.2), 0.5, False),
        ([replica("a", load=0.1), replica("b", load=0.4)], 0.0, False),
        ([*replicas(2, load=0.3), replica("leaving", DRAINING, load=0.1)], 0.0, False),
    ],
)
def test_survivors_must_carry_their_share_of_the_work(pool: list[ReplicaObservation], work_s: float, copes: bool) -> None:
    assert _cope(pool, 2, 1, work_s) is copes


def test_stopping_what_has_not_started_needs_no_survivor_check() -> None:
    assert _cope([*replicas(1, load=0.9), *replicas(1, STARTING)], 2, 1)


def test_a_step_waits_for_the_last_one() -> None:
    assert not _cope(replicas(3), 2, 1)


def test_starting_replicas_go_first_then_the_least_busy_then_the_highest_id() -> None:
    pool = [
        replica("d", running=2),
        replica("a", running=1, load=0.5),
        replica("b", running=1, load=0.2),
        replica("c", running=1, load=0.2),
        replica("e", STARTING, running=9),
        replica("f", DRAINING),
    ]
    assert choose_victims(pool, 9) == ["e", "c", "b", "a", "d"]
    assert choose_victims(reversed(pool), 2) == ["e", "c"]
    assert choose_victims(pool, -1) == []
