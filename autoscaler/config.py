"""The autoscaler's settings: unit, default and why this default.

Must not read files or the environment: `main.py` does, once.
"""

import math
from dataclasses import dataclass

from autoscaler.observation import PoolKey
from tandem.domain import ModelId, Role
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """How small and how large one pool may be. Only a target set by hand and failing starts go below the minimum."""

    model: ModelId
    role: Role
    min_replicas: int = 1  # 0 lets the pool go to zero when the model is idle
    max_replicas: int = 4
    initial_replicas: int = 1  # in an empty cluster, and when demand wakes the pool
    inherited_replicas: int | None = None  # the target of the leader before; None: there was none

    @property
    def key(self) -> PoolKey:
        """The pool."""
        return PoolKey(model=self.model, role=self.role)

    def validate(self) -> None:
        """Raises ConfigError where the three are not in order."""
        if not 0 <= self.min_replicas <= self.initial_replicas <= self.max_replicas:
            counts = f"min {self.min_replicas}, initial {self.initial_replicas}, max {self.max_replicas}"
            raise ConfigError(f"{self.role} pool of {self.model!r}: replicas must be 0 <= min <= initial <= max, got {counts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalerConfig:
    """Every threshold and wait of the scaling rules."""

    # Up.
    scale_up_backlog_s: float = 1.0  # prefill work ahead per replica: a TTFT objective of some seconds is still met
    target_drain_s: float = 0.8  # sized so that no replica has more ahead; the consolidation limit, so nothing bought is surplus
    scale_up_load_fraction: float = 0.8  # mean; above, preemption and queues in the engine begin
    target_load_fraction: float = 0.6  # three quarters of the limit: room for a third more traffic, and below what consolidation allows
    queued_request_load_fraction: float = 1 / 64  # of one queued request where none runs to compare with: the default max_num_seqs
    up_window_s: float = 30.0  # a start-up on a GPU, after which the effect of the last growth is seen
    up_factor: float = 2.0  # growth within up_window_s at most: a wrong reading costs one doubling

    # Down.
    stabilisation_s: float = 60.0  # the largest need of this time counts: a minute outlasts the gaps in bursty traffic
    consolidation_fraction: float = 0.8  # of both limits, for each survivor after the step: no step down causes a step up
    down_step_fraction: float = 0.1  # at once, at least one replica: a large pool shrinks in tens of steps, not hundreds
    cooldown_s: float = 15.0  # after any change of the pool: three observations of 5 s show the survivors' load
    idle_s: float = 120.0  # without any request before zero: some ten start-ups of a replica that is forked

    # Starts that fail.
    backoff_first_s: float = 2.0  # one start from the zygote
    backoff_max_s: float = 60.0  # one attempt a minute is cheap, and soon enough after the cause is mended

    def validate(self) -> None:
        """Raises ConfigError naming the setting."""
        for name in self.__slots__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"{name} must be a finite number above 0, got {value}")
        for name in ("scale_up_load_fraction", "queued_request_load_fraction", "consolidation_fraction", "down_step_fraction"):
            if getattr(self, name) > 1.0:
                raise ConfigError(f"{name} must be at most 1, got {getattr(self, name)}")
        if self.up_factor <= 1.0:
            raise ConfigError(f"up_factor must be above 1, got {self.up_factor}")
        # Else a pool that is too small would be sized no larger, or one just made larger would be too large.
        for target, limit in (("target_drain_s", "scale_up_backlog_s"), ("target_load_fraction", "scale_up_load_fraction")):
            if getattr(self, target) > getattr(self, limit):
                raise ConfigError(f"{target} must be at most {limit} ({getattr(self, limit)}), got {getattr(self, target)}")
        if self.backoff_first_s > self.backoff_max_s:
            raise ConfigError(f"backoff_first_s must be at most backoff_max_s ({self.backoff_max_s}), got {self.backoff_first_s}")
