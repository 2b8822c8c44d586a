"""The autoscaler's state machine: observations in, plans out. No clock, no I/O, no logging; `now_s` comes with each event.

Owns the order of the rules and what concerns a model as a whole; the first that applies to a pool wins:

  manual      a target set by hand, from 0 to the maximum
  hold        data are missing: nothing moves, visible demand still wakes a pool at zero
  bounds      minimum and maximum, when the automatic rules take a pool over
  wake        something waits, and the pool is at zero or the model has no replica
  up          by backlog or load, at once, at most `up_factor` in `up_window_s`
  idle        no request for `idle_s`: all pools of the model to zero together
  down        one step, never while a pool of the model grows or is short

Failing starts hold back what any of them orders. Must not start or stop anything, nor know how a replica is run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from autoscaler.config import PoolLimits, ScalerConfig
from autoscaler.observation import ModelDemand, Observation, PoolKey
from autoscaler.plan import Plan, PoolDecision
from autoscaler.pool_rules import PoolRules
from autoscaler.sizing import PoolView, view_pool
from tandem.domain import ModelId, ReplicaTarget, Role
from tandem.errors import ConfigError


class ScalerCore:
    """All state of the scaling rules. Pools that are not configured are left alone."""

    def __init__(self, limits: Iterable[PoolLimits], config: ScalerConfig) -> None:
        """Raises ConfigError where the settings make no sense together."""
        config.validate()
        by_model: dict[ModelId, dict[Role, PoolLimits]] = {}
        for item in limits:
            item.validate()
            roles = by_model.setdefault(item.model, {})
            if item.role in roles:
                raise ConfigError(f"the {item.role} pool of {item.model!r} is configured twice")
            roles[item.role] = item
        self._models = {model: _ModelRules(by_model[model], config) for model in sorted(by_model)}

    def starts_failed(self, pool: PoolKey, now_s: float) -> None:
        """Replicas of the pool did not start: one call for each of them, or for all of one attempt."""
        model = self._models.get(pool.model)
        if model is not None:
            model.starts_failed(pool.role, now_s)

    def tick(self, observation: Observation, now_s: float) -> Plan:
        """What is wanted now, a decision for every configured pool. O(replicas log replicas)."""
        manual = {
            PoolKey(model=target.model, role=target.role): target
            for target in observation.manual_targets
            if target.replicas >= 0 and target.expires_in_s >= 0.0
        }
        demands = {demand.model: demand for demand in observation.demands}
        return tuple(
            decision
            for name, model in self._models.items()
            for decision in model.tick(observation, demands.get(name, ModelDemand(model=name)), manual, now_s)
        )


class _ModelRules:
    """The pools of one model, and since when nothing was asked of it."""

    def __init__(self, limits: Mapping[Role, PoolLimits], config: ScalerConfig) -> None:
        usable = [role for role in Role if role in limits and limits[role].max_replicas > 0]
        if not usable:
            raise ConfigError(f"no pool of {next(iter(limits.values())).model!r} may have a replica")
        # Every replica can do both, so a model can be served by one pool alone.
        self._prompt_role = Role.PREFILL if Role.PREFILL in usable else Role.DECODE
        self._output_role = Role.DECODE if Role.DECODE in usable else Role.PREFILL
        self._config = config
        self._pools = {
            role: PoolRules(limits[role], config, wake_replicas=max(limits[role].initial_replicas, 1 if role is self._output_role else 0))
            for role in sorted(limits)
        }
        self._active_s = math.inf  # when it was last in use, as far as is known

    def starts_failed(self, role: Role, now_s: float) -> None:
        if role in self._pools:
            self._pools[role].starts_failed(now_s)

    def tick(
        self, observation: Observation, demand: ModelDemand, manual: Mapping[PoolKey, ReplicaTarget], now_s: float
    ) -> Sequence[PoolDecision]:
        views = self._views(observation, demand)
        # What was just asked for has its idle time before it.
        is_used = demand.is_waiting or demand.recent_requests > 0 or any(view.is_working or view.starting for view in views.values())
        # Where data are missing it may be in use; at the first tick nothing is known of before.
        self._active_s = now_s if is_used or not observation.is_complete else min(self._active_s, now_s)
        is_down = not any(view.live for view in views.values())
        for role, pool in self._pools.items():
            view, target = views[role], manual.get(pool.limits.key)
            pool.begin(view, now_s)
            if target is not None:
                pool.obey(target)
            elif observation.is_complete:
                pool.go_on(view, is_waiting=demand.is_waiting, is_model_down=is_down, now_s=now_s)
            else:
                pool.hold(view, is_waiting=demand.is_waiting)
            if observation.is_complete:
                pool.weigh(view, now_s)
            else:
                pool.assume(now_s)
        if observation.is_complete and not any(pool.is_growing(views[role], now_s) for role, pool in self._pools.items()):
            self._lower(views, now_s)
        return [pool.decide(views[role], now_s) for role, pool in self._pools.items()]

    def _lower(self, views: Mapping[Role, PoolView], now_s: float) -> None:
        """To zero together, or each a step down."""
        is_idle = now_s - self._active_s >= self._config.idle_s
        if is_idle and all(pool.may_sleep for pool in self._pools.values()):
            for pool in self._pools.values():
                pool.sleep()
        else:
            for role, pool in self._pools.items():
                pool.shrink(views[role], now_s)

    def _views(self, observation: Observation, demand: ModelDemand) -> dict[Role, PoolView]:
        replicas = {role: observation.replicas.get(pool.limits.key, ()) for role, pool in self._pools.items()}
        is_work_known = demand.queued_work_s > 0.0 or any(replica.backlog_s > 0.0 for pool in replicas.values() for replica in pool)
        return {
            role: view_pool(
                replicas[role],
                demand,
                takes_prompts=role is self._prompt_role,
                generates=role is self._output_role,
                is_work_known=is_work_known,
            )
            for role in self._pools
        }
