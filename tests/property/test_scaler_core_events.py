"""After any sequence of observations the plan keeps the promises of the rules; with a constant one it comes to rest.

Replicas follow the plan, late, never or on their own; data go missing; people set targets; starts fail.
"""

import math
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from autoscaler.config import PoolLimits, ScalerConfig
from autoscaler.core import ScalerCore
from autoscaler.observation import ModelDemand, Observation, PoolKey, ReplicaObservation
from autoscaler.plan import DecisionReason, Plan
from tandem.domain import ReplicaId, ReplicaState, ReplicaTarget, Role
from tests.scaler_talk import DECODE, MODEL, PREFILL, Scaler, limits, replica

CONFIG = ScalerConfig()
KEYS = {Role.PREFILL: PREFILL, Role.DECODE: DECODE}
DOWN = {DecisionReason.SURPLUS, DecisionReason.IDLE}
# What lets a count leave the bounds: a person, and replicas that cannot be started.
UNBOUNDED = {DecisionReason.MANUAL, DecisionReason.BACKOFF}
LOADS = st.sampled_from((0.0, 0.1, 0.5, 0.79, 0.81, 1.0))
BACKLOGS_S = st.sampled_from((0.0, 0.2, 0.9, 1.1, 5.0, 100.0))


@st.composite
def pool_limits(draw: st.DrawFn, role: Role) -> PoolLimits:
    low, initial, high = sorted(draw(st.tuples(*[st.integers(0, 6)] * 3)))
    return limits(role, low, max(high, 1), initial)


class ScalerEvents(RuleBasedStateMachine):
    """One model; `replicas` is the truth, of which an incomplete observation shows a part."""

    @initialize(prefill=pool_limits(Role.PREFILL), decode=pool_limits(Role.DECODE))
    def begin(self, prefill: PoolLimits, decode: PoolLimits) -> None:
        self.limits = {Role.PREFILL: prefill, Role.DECODE: decode}
        self.core = ScalerCore([prefill, decode], CONFIG)
        self.now_s = 0.0
        self.replicas: dict[PoolKey, dict[ReplicaId, ReplicaObservation]] = {PREFILL: {}, DECODE: {}}
        self.demand = ModelDemand(model=MODEL)
        self.manual: dict[Role, tuple[int, float]] = {}  # count, and when it ends
        self.was_manual: set[Role] = set()  # its end has not been seen complete
        self.plan: Plan = ()
        self.number = 0

    @rule(queued=st.sampled_from((0, 1, 50)), work_s=st.sampled_from((0.0, 0.5, 20.0)), recent=st.integers(0, 1))
    def demand_changes(self, queued: int, work_s: float, recent: int) -> None:
        self.demand = ModelDemand(model=MODEL, queued_requests=queued, queued_work_s=work_s, recent_requests=recent)

    @rule(role=st.sampled_from(Role), state=st.sampled_from(ReplicaState), load=LOADS, running=st.integers(0, 3), backlog_s=BACKLOGS_S)
    def replica_appears(self, role: Role, state: ReplicaState, load: float, running: int, backlog_s: float) -> None:
        self.number += 1
        name = ReplicaId(f"r{self.number}")
        self.replicas[KEYS[role]][name] = replica(name, state, load=load, running=running, backlog_s=backlog_s)

    @rule(role=st.sampled_from(Role), data=st.data())
    def replica_goes(self, role: Role, data: st.DataObject) -> None:
        pool = self.replicas[KEYS[role]]
        if pool:
            del pool[data.draw(st.sampled_from(sorted(pool)))]

    @rule(role=st.sampled_from(Role), count=st.integers(0, 9), left_s=st.sampled_from((7.0, 100.0, math.inf)))
    def set_by_hand(self, role: Role, count: int, left_s: float) -> None:
        self.manual[role] = (count, self.now_s + left_s)

    @rule(role=st.sampled_from(Role))
    def taken_back(self, role: Role) -> None:
        self.manual.pop(role, None)

    @rule(role=st.sampled_from(Role))
    def starts_fail(self, role: Role) -> None:
        self.core.starts_failed(KEYS[role], self.now_s)

    @precondition(lambda self: self.plan)
    @rule(state=st.sampled_from((ReplicaState.STARTING, ReplicaState.READY)), load=LOADS, running=st.integers(0, 1))
    def replicas_follow(self, state: ReplicaState, load: float, running: int) -> None:
        for decision in self.plan:
            self.replicas[decision.key] = {
                ReplicaId(f"{decision.role}-{n}"): replica(f"{decision.role}-{n}", state, load=load, running=running)
                for n in range(decision.replicas)
            }

    @rule(seconds=st.sampled_from((0.1, 5.0, 16.0, 61.0, 130.0)))
    def complete(self, seconds: float) -> None:
        self._tick(seconds, is_complete=True)

    @rule(seconds=st.sampled_from((0.1, 5.0, 61.0, 130.0)), is_register_lost=st.booleans(), seen=st.integers(0, 3))
    def incomplete(self, seconds: float, is_register_lost: bool, seen: int) -> None:
        self._tick(seconds, is_complete=False, is_register_lost=is_register_lost, seen=seen)

    def _tick(self, seconds: float, *, is_complete: bool, is_register_lost: bool = False, seen: int | None = None) -> None:
        self.now_s += seconds
        self.manual = {role: (count, end_s) for role, (count, end_s) in self.manual.items() if end_s > self.now_s}
        manual = () if is_register_lost else tuple(self._target(role, *what) for role, what in sorted(self.manual.items()))
        observation = Observation(
            replicas={key: tuple(pool.values())[:seen] for key, pool in self.replicas.items()},
            demands=(self.demand,),
            manual_targets=manual,
            is_complete=is_complete,
        )
        before = {decision.role: decision for decision in self.plan}
        self.plan = self.core.tick(observation, self.now_s)
        by_hand = {target.role for target in manual}
        self.was_manual = self.was_manual & ({*Role} if not is_complete else set()) | by_hand
        assert [decision.role for decision in self.plan] == sorted(Role)
        for decision in self.plan:
            bounds, role = self.limits[decision.role], decision.role
            live = [r for r in observation.replicas[KEYS[role]] if r.state is not ReplicaState.DRAINING]
            assert decision.current == len(live)
            assert 0 <= decision.replicas <= bounds.max_replicas
            if role not in self.was_manual and decision.reason not in UNBOUNDED:
                assert decision.replicas >= bounds.min_replicas
            if role in by_hand and decision.reason is not DecisionReason.BACKOFF:
                assert decision.reason is DecisionReason.MANUAL
                assert decision.replicas == min(self.manual[role][0], bounds.max_replicas)
            if before:
                assert decision.is_changed == (decision.replicas != before[role].replicas)
            if not is_complete and role not in by_hand:
                assert not decision.may_stop
                if before and decision.reason is not DecisionReason.BACKOFF and before[role].reason is not DecisionReason.BACKOFF:
                    assert decision.replicas >= before[role].replicas, "went down on missing data"
            if role is Role.DECODE and self.demand.is_waiting and role not in self.was_manual and decision.reason not in UNBOUNDED:
                assert decision.replicas >= 1, "demand did not wake the model"
        if before and any(decision.is_changed and decision.reason in DOWN for decision in self.plan):
            assert all(decision.replicas <= before[decision.role].replicas for decision in self.plan), "up and down at once"

    def _target(self, role: Role, count: int, end_s: float) -> ReplicaTarget:
        left_s = 0.0 if end_s == math.inf else end_s - self.now_s
        return ReplicaTarget(model=MODEL, role=role, replicas=count, expires_in_s=left_s)


ScalerEvents.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestScalerEvents = ScalerEvents.TestCase


def _changes(counts: list[int]) -> list[int]:
    return [after - before for before, after in pairwise(counts) if after != before]


REPLICAS = st.lists(st.tuples(st.sampled_from(ReplicaState), LOADS, st.integers(0, 3), BACKLOGS_S), max_size=6)


@given(
    st.tuples(pool_limits(Role.PREFILL), pool_limits(Role.DECODE)),
    st.tuples(REPLICAS, REPLICAS),
    st.sampled_from((0, 1, 50)),
    st.sampled_from((0.0, 0.5, 20.0)),
    st.booleans(),
)
def test_a_constant_observation_comes_to_rest(
    bounds: tuple[PoolLimits, PoolLimits],
    pools: tuple[list[tuple[ReplicaState, float, int, float]], ...],
    queued: int,
    work_s: float,
    is_complete: bool,
) -> None:
    scaler = Scaler(*bounds)
    prefill, decode = (
        [
            ReplicaObservation(
                replica_id=ReplicaId(f"r{n}"), state=state, load_fraction=load, running_requests=running, backlog_s=backlog_s
            )
            for n, (state, load, running, backlog_s) in enumerate(pool)
        ]
        for pool in pools
    )
    plans = [scaler.see(prefill, decode, queued=queued, work_s=work_s, is_complete=is_complete) for _ in range(140)]
    for role in Role:
        counts = [plan[role].replicas for plan in plans]
        steps = _changes(counts)
        assert all(step > 0 for step in steps) or all(step < 0 for step in steps), f"turned round: {counts}"
        assert len(set(counts[100:])) == 1, f"no rest: {counts}"


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.floats(0.0, 10.0),
    st.floats(0.0, 10.0),
    st.integers(0, 20),
    st.integers(0, 30),
)
def test_a_pool_that_follows_its_plan_under_constant_work_never_turns_round(
    sizes: tuple[int, int], load: float, backlog_s: float, queued: int, startup_ticks: int
) -> None:
    """Work is shared out evenly; a replica is ready `startup_ticks` after it was ordered."""
    scaler = Scaler(limits(Role.PREFILL, high=40), limits(Role.DECODE, high=40))
    wanted = dict(zip(Role, sizes, strict=True))
    ordered_at = {role: [-math.inf] * count for role, count in wanted.items()}
    history: dict[Role, list[int]] = {role: [count] for role, count in wanted.items()}
    for tick in range(250):
        pools = {}
        for role, times in ordered_at.items():
            ready = max(sum(tick - at >= startup_ticks for at in times), 1)
            shared_load = min(load / ready, 1.0) if role is Role.DECODE else 0.0
            shared_backlog_s = backlog_s / ready if role is Role.PREFILL else 0.0
            pools[role] = [
                replica(f"r{n}", load=shared_load, running=1, backlog_s=shared_backlog_s)
                if n < ready
                else replica(f"r{n}", ReplicaState.STARTING)
                for n in range(len(times))
            ]
        plan = scaler.see(pools[Role.PREFILL], pools[Role.DECODE], queued=queued)
        for role, decision in plan.items():
            times = ordered_at[role]
            ordered_at[role] = (times + [tick] * decision.replicas)[: decision.replicas]
            history[role].append(decision.replicas)
    for role, counts in history.items():
        steps = _changes(counts)
        ups = [index for index, step in enumerate(steps) if step > 0]
        downs = [index for index, step in enumerate(steps) if step < 0]
        assert not (ups and downs and max(ups) > min(downs)), f"{role} shrank and then grew: {counts}"
        assert len(set(counts[-20:])) == 1, f"{role} did not come to rest: {counts}"
