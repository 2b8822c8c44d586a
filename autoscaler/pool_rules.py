"""The target of one pool: who controls it, what it was, and each rule that may move it.

Must not look at other pools: `core.py` does, and calls the rules in their order. One tick is `begin`, some rules, `decide`.
"""

import math
from enum import Enum, auto

from autoscaler.config import PoolLimits, ScalerConfig
from autoscaler.guards import BackOff, WindowExtreme, survivors_cope
from autoscaler.plan import DecisionReason, PoolDecision
from autoscaler.sizing import Need, PoolView, size
from tandem.domain import ReplicaId, ReplicaTarget


class _Control(Enum):
    UNKNOWN = auto()  # no complete observation yet
    MANUAL = auto()
    AUTOMATIC = auto()


class PoolRules:
    """One pool's state. `wake_replicas` is what demand wakes it to, 0 where its model can do without it."""

    def __init__(self, limits: PoolLimits, config: ScalerConfig, *, wake_replicas: int) -> None:
        self.limits = limits
        self._config = config
        self._wake_replicas = wake_replicas
        self._control = _Control.UNKNOWN
        self._wanted = 0
        self._wanted_before = 0
        self._ordered = 0  # the last decision: below the target while starts fail
        self._has_begun = False
        self._began_empty = False
        self._changed_s = -math.inf
        self._ready_ids: frozenset[ReplicaId] = frozenset()
        self._back_off = BackOff(config.backoff_first_s, config.backoff_max_s)
        self._needs = WindowExtreme(config.stabilisation_s, max)
        self._largest_need = limits.max_replicas
        self._targets = WindowExtreme(config.up_window_s, min)
        self._smallest_target = 0
        self._waking = 0  # replicas that demand needs before any work is seen on them
        self._is_short = False
        self._reason, self._detail = DecisionReason.STEADY, ""

    @property
    def may_sleep(self) -> bool:
        """Whether the model's idleness may leave it without this pool."""
        return self.limits.min_replicas == 0 if self._control is _Control.AUTOMATIC else self._wanted == 0

    def starts_failed(self, now_s: float) -> None:
        """Replicas of the pool did not start."""
        self._back_off.failed(now_s)

    def begin(self, view: PoolView, now_s: float) -> None:
        """A new tick: no rule has decided yet."""
        if not self._has_begun:
            self._has_begun = True
            self._ordered = view.live
            self._began_empty = not view.live
            self._needs.add(self.limits.max_replicas, now_s)  # what was needed before is not known: no step down for a whole window
        self._wanted_before = self._wanted
        self._smallest_target = self._targets.add(self._wanted, now_s)
        self._waking, self._is_short = 0, False
        self._reason, self._detail = DecisionReason.STEADY, f"{self._wanted} replicas do"

    def obey(self, target: ReplicaTarget) -> None:
        """A target set by hand: from 0 to the maximum, whatever the data say."""
        self._control = _Control.MANUAL
        until = f"for {target.expires_in_s:.0f} s more" if target.expires_in_s > 0.0 else "until it is taken back"
        self._move(min(target.replicas, self.limits.max_replicas), DecisionReason.MANUAL, f"{target.replicas} set by hand {until}")

    def hold(self, view: PoolView, *, is_waiting: bool) -> None:
        """Data are missing: nothing moves, but visible demand wakes the pool. A zero set by hand stays: its end cannot be seen."""
        wanted = self._wanted
        if self._control is _Control.UNKNOWN:
            wanted = self._bounded(max(wanted, view.live))
        self._move(wanted, DecisionReason.HOLD, "a router or the register did not answer")
        if self._control is not _Control.MANUAL and is_waiting and wanted == 0:
            self._wake()

    def go_on(self, view: PoolView, *, is_waiting: bool, is_model_down: bool, now_s: float) -> None:
        """The automatic rules that keep a pool or let it grow."""
        if self._control is not _Control.AUTOMATIC:
            self._take_over(view, now_s)
        if is_waiting and (self._wanted == 0 or is_model_down):
            self._wake()

    def assume(self, now_s: float) -> None:
        """Data are missing: the work may have needed all that is wanted."""
        self._needs.add(self._wanted, now_s)

    def weigh(self, view: PoolView, now_s: float) -> None:
        """Takes down what the work needs and whether starts succeed; grows at once where the automatic rules have a pool that is short."""
        ready_ids = frozenset(replica.replica_id for replica in view.ready)
        if ready_ids - self._ready_ids or len(ready_ids) >= self._wanted:
            self._back_off.succeeded()
        self._ready_ids = ready_ids
        need = size(view, self._wanted, self._config)
        self._largest_need = self._needs.add(max(need.replicas, self._waking), now_s)
        self._is_short = need.is_short
        if self._control is _Control.AUTOMATIC and need.is_short and self._reason is not DecisionReason.WAKE:
            self._grow(need)

    def is_growing(self, view: PoolView, now_s: float) -> bool:
        """Whether the pool grows in this tick, or should and cannot."""
        return self._is_short or self._startable(view, now_s) > self._ordered

    def sleep(self) -> None:
        """To zero, if the automatic rules have the pool."""
        if self._control is _Control.AUTOMATIC and self._wanted:
            self._move(0, DecisionReason.IDLE, f"no request for {self._config.idle_s:.0f} s")

    def shrink(self, view: PoolView, now_s: float) -> None:
        """One step down, if all the work of the window needed less, the survivors cope, and the last change is some time ago."""
        floor = max(self.limits.min_replicas, self._largest_need, 1)
        is_cool = now_s - self._changed_s >= self._config.cooldown_s
        if self._control is not _Control.AUTOMATIC or self._wanted <= floor or not is_cool:
            return
        step = max(1, int(self._wanted * self._config.down_step_fraction))
        replicas = max(self._wanted - step, floor)
        if survivors_cope(view, wanted=self._wanted, replicas=replicas, config=self._config):
            detail = f"{self._largest_need} replicas did for {self._config.stabilisation_s:.0f} s"
            self._move(replicas, DecisionReason.SURPLUS, detail)

    def decide(self, view: PoolView, now_s: float) -> PoolDecision:
        """Ends the tick. While starts fail the decision is what is there, and the target stays."""
        before, replicas = self._ordered, self._startable(view, now_s)
        if replicas < self._wanted:
            left_s = self._back_off.left_s(now_s)
            detail = f"replicas fail to start: {view.live} of {self._wanted}, tried again in {left_s:.0f} s"
            self._reason, self._detail = DecisionReason.BACKOFF, detail
        elif self._reason is DecisionReason.STEADY and replicas != before:
            self._reason, self._detail = DecisionReason.RETRY, f"starting up to {replicas} again"
        is_changed = replicas != before
        if is_changed or self._wanted != self._wanted_before:
            self._changed_s = now_s
        self._ordered = replicas
        self._targets.add(self._wanted, now_s)
        return PoolDecision(
            model=self.limits.model,
            role=self.limits.role,
            replicas=replicas,
            current=view.live,
            reason=self._reason,
            detail=self._detail,
            is_changed=is_changed,
        )

    # Inside.

    def _take_over(self, view: PoolView, now_s: float) -> None:
        """From the target of the leader before, else from what is there; a pool that was empty at first gets its initial count."""
        wanted, inherited = view.live, self.limits.inherited_replicas
        is_first = self._control is _Control.UNKNOWN
        if is_first and inherited is not None:
            wanted = max(self._wanted, inherited)
        elif is_first:  # whatever a hold has started of it
            wanted = max(self._wanted, view.live, self.limits.initial_replicas if self._began_empty else 0)
        self._control = _Control.AUTOMATIC
        reason = DecisionReason.INITIAL if inherited is None and wanted > view.live else DecisionReason.ADOPTED
        bounded = self._bounded(wanted)
        if bounded != wanted:
            reason = DecisionReason.MINIMUM if bounded > wanted else DecisionReason.MAXIMUM
        self._move(bounded, reason, f"{view.live} replicas are there, {self.limits.min_replicas} to {self.limits.max_replicas} allowed")
        self._targets = WindowExtreme(self._config.up_window_s, min)  # growth is counted from here
        self._smallest_target = self._targets.add(bounded, now_s)

    def _wake(self) -> None:
        self._waking = self._wake_replicas
        if self._wake_replicas > self._wanted:
            self._move(self._wake_replicas, DecisionReason.WAKE, "requests wait and no replica serves them")

    def _grow(self, need: Need) -> None:
        base = self._smallest_target or max(self._wake_replicas, 1)
        cap = max(int(base * self._config.up_factor), base + 1)
        replicas = min(need.replicas, cap, self.limits.max_replicas)
        if replicas > self._wanted:
            self._move(replicas, need.reason, f"{need.detail}, {need.replicas} needed")

    def _startable(self, view: PoolView, now_s: float) -> int:
        """The target, or what is there while no more may be started."""
        return min(self._wanted, view.live) if self._back_off.left_s(now_s) > 0.0 else self._wanted

    def _bounded(self, replicas: int) -> int:
        return min(max(replicas, self.limits.min_replicas), self.limits.max_replicas)

    def _move(self, wanted: int, reason: DecisionReason, detail: str) -> None:
        self._wanted, self._reason, self._detail = wanted, reason, detail
