"""The router's settings: unit, default and why this default.

Must not read files or the environment: `main.py` does, once.
"""

from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Every limit and wait of one router."""

    router_id: str = "router-0"
    cluster: str = ""
    max_queued_requests: int = (
        1024  # for one model, so that none takes another's room; at 10 requests/s about 100 s of wait, beyond any sensible deadline
    )
    max_running_requests: int = 256  # dispatched at once; four engines of 64 sequences
    retry_budget: int = 2  # further decode workers after the first
    retry_hold_s: float = 0.5  # before a replica that failed a request may have it again, if there is no other
    no_replica_wait_s: float = 5.0  # a replica restart takes 2 s from the zygote
    cold_start_wait_s: float = 60.0  # where an autoscaler will start one: a large model on a GPU loads in about this
    handoff_min_tokens: int | None = None  # None: 2 blocks; below, a hand-off ships at most one block and saves nothing
    max_prefill_candidates: int = 3  # what a decode worker can fall back on by itself
    max_prefix_blocks: int = 200_000  # about 50 MB of router memory, 6.4 million tokens of 32-token blocks
    stamp_settle_s: float = 5.0  # after this a FINISHED stamp that has not come is given up: 25 reports at 5 Hz
    default_output_tokens: int = 128  # what a request is expected to produce where it does not say
    tick_s: float = 0.05  # how late a queued request's deadline may be noticed
    watch_silence_s: float = 2.5  # twelve reports at 5 Hz missed, two of an idle replica: it hangs
    stream_silence_s: float = 330.0  # between two messages of a stream: beyond what a replica gives its own engine while that computes
    rebalance_gap_fraction: float = 0.25  # of KV room, between the fullest decode replica and the emptiest; 1: nothing is moved for it
    rebalance_after_s: float = 2.0  # for so long it must have been so, and as long after each move
    reconnect_max_s: float = 0.25  # a replica is back in a second; one that is gone leaves the register, and is tried no more

    def validate(self) -> None:
        """Raises ConfigError naming the setting."""
        for name in ("max_queued_requests", "max_running_requests", "max_prefill_candidates", "max_prefix_blocks", "default_output_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("retry_budget", "retry_hold_s", "no_replica_wait_s", "cold_start_wait_s", "stamp_settle_s", "rebalance_after_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("tick_s", "watch_silence_s", "stream_silence_s", "rebalance_gap_fraction", "reconnect_max_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.handoff_min_tokens is not None and self.handoff_min_tokens < 0:
            raise ConfigError(f"handoff_min_tokens must not be negative, got {self.handoff_min_tokens}")
