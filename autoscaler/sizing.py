"""How many replicas the work of one pool needs, by prefill work ahead and by load.

Must not know limits, history or time: `pool_rules.py` applies them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoscaler.config import ScalerConfig
from autoscaler.observation import ModelDemand, ReplicaObservation
from autoscaler.plan import DecisionReason
from tandem.domain import ReplicaState

# What sums of fractions are off by at most; without it 1.8 / 0.6 needs 4 replicas.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """One pool of one observation, by state, with what waits for it in the routers."""

    ready: tuple[ReplicaObservation, ...]
    starting: tuple[ReplicaObservation, ...]
    draining: tuple[ReplicaObservation, ...]
    takes_prompts: bool  # prefill work of the model comes here
    generates: bool  # decode work of the model comes here
    queued_work_s: float  # 0 where the pool takes no prompts
    queued_requests: int  # that nothing but their number is known of; 0 where the pool does not generate

    @property
    def live(self) -> int:
        """Replicas that serve or will."""
        return len(self.ready) + len(self.starting)

    @property
    def is_working(self) -> bool:
        """Whether any replica has something to do."""
        return self.backlog_s > 0.0 or any(replica.running_requests for replica in (*self.ready, *self.starting, *self.draining))

    @property
    def load(self) -> float:
        """Full replicas' worth of load, draining ones' included: their requests go on elsewhere in the pool."""
        return sum(replica.load_fraction for replica in (*self.ready, *self.draining))

    @property
    def backlog_s(self) -> float:
        """Seconds of prefill work on all replicas and in the routers."""
        return self.queued_work_s + sum(replica.backlog_s for replica in (*self.ready, *self.starting, *self.draining))


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Replicas that the work needs. `is_short`: the wanted count is so far below it that the pool should grow now."""

    replicas: int
    is_short: bool
    reason: DecisionReason
    detail: str


def view_pool(
    replicas: Sequence[ReplicaObservation], demand: ModelDemand, *, takes_prompts: bool, generates: bool, is_work_known: bool
) -> PoolView:
    """The pool's part of an observation; `is_work_known` says whether any prefill work of the model was predicted."""
    by_state = {state: tuple(replica for replica in replicas if replica.state is state) for state in ReplicaState}
    return PoolView(
        ready=by_state[ReplicaState.READY],
        starting=by_state[ReplicaState.STARTING],
        draining=by_state[ReplicaState.DRAINING],
        takes_prompts=takes_prompts,
        generates=generates,
        queued_work_s=demand.queued_work_s if takes_prompts else 0.0,
        queued_requests=demand.queued_requests if generates and not is_work_known else 0,
    )


def size(view: PoolView, wanted: int, config: ScalerConfig) -> Need:
    """The larger of the needs by backlog and by load. `wanted` counts as capacity, started or not: nothing is bought twice."""
    needs = [Need(replicas=0, is_short=False, reason=DecisionReason.STEADY, detail="")]
    if view.takes_prompts:
        needs.append(_by_backlog(view, wanted, config))
    if view.generates:
        needs.append(_by_load(view, wanted, config))
    return max(needs, key=lambda need: (need.is_short, need.replicas))


def _by_backlog(view: PoolView, wanted: int, config: ScalerConfig) -> Need:
    """Sized by the work ahead, not by one more each time: what is there is drained within `target_drain_s`."""
    work_s = view.backlog_s
    return Need(
        replicas=_ceil(work_s / config.target_drain_s),
        is_short=_exceeds(work_s, config.scale_up_backlog_s * max(wanted, 1)),
        reason=DecisionReason.BACKLOG,
        detail=f"{work_s:.1f} s of prefill work ahead of {wanted} replicas",
    )


def _by_load(view: PoolView, wanted: int, config: ScalerConfig) -> Need:
    """Sized to `target_load_fraction`. Queued requests count as load only once all replicas are there and still leave them waiting."""
    load, reason, detail = view.load, DecisionReason.LOAD, f"load of {view.load:.2f} replicas on {wanted}"
    floor = 0
    if view.queued_requests:
        if not view.starting and len(view.ready) >= wanted:
            load += view.queued_requests * _request_load(view, config)
            reason, detail = DecisionReason.QUEUE, f"{detail}, {view.queued_requests} requests queued"
        else:
            floor = wanted  # what the queue has bought is kept while it starts
    return Need(
        replicas=max(_ceil(load / config.target_load_fraction), floor),
        is_short=_exceeds(load, config.scale_up_load_fraction * max(wanted, 1)),
        reason=reason,
        detail=detail,
    )


def _request_load(view: PoolView, config: ScalerConfig) -> float:
    """Load of one request: the mean of those that run, else the configured guess."""
    running_requests = sum(replica.running_requests for replica in (*view.ready, *view.draining))
    return view.load / running_requests if running_requests and view.load > 0.0 else config.queued_request_load_fraction


def _ceil(replicas: float) -> int:
    return math.ceil(replicas - _ROUNDING)


def _exceeds(value: float, limit: float) -> bool:
    return value > limit + _ROUNDING
