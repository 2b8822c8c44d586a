"""The router's settings: unit, default and why this default.

Must not read files or the environment: `main.py` does, once.
"""

from dataclasses import dataclass
from enum import StrEnum

from router.policies import DEFAULT_POLICY, POLICIES
from tandem.domain import MAX_PREFILL_CANDIDATES
from tandem.errors import ConfigError


class QueueOrder(StrEnum):
    """Who is next among one tenant's requests of one class."""

    SLACK = "slack"  # the least time left until it must start to meet its TTFT objective; late ones last
    SHORTEST = "shortest"  # the least predicted work, with ageing


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Every limit and wait of one router."""

    router_id: str = "router-0"
    cluster: str = ""
    max_queued_requests: int = 1024  # for one model, so that none takes another's room; at 10 requests/s some 100 s of wait
    max_running_requests: int = 256  # dispatched at once; four engines of 64 sequences
    policy: str = DEFAULT_POLICY  # how prefill workers are ranked; the others are there to compare with
    queue_order: QueueOrder = QueueOrder.SLACK
    queue_ageing: float = 0.5  # shortest first: a second of wait outweighs half a second of work, so nobody starves
    default_ttft_s: float = 10.0  # objective of requests that state none: orders them, rejects nobody
    ahead_s: float = 0.05  # of work beyond one chunk that a prefill worker is given: what a dispatch takes to arrive, generously
    retry_budget: int = 2  # further decode workers after the first
    retry_hold_s: float = 0.5  # before a replica that failed a request may have it again, if there is no other
    no_replica_wait_s: float = 5.0  # a replica restart takes 2 s from the zygote
    cold_start_wait_s: float = 60.0  # where an autoscaler will start one: a large model on a GPU loads in about this
    handoff_min_tokens: int | None = None  # None: 2 blocks; below, a hand-off ships at most one block and saves nothing
    one_worker_max_tokens: int | None = None  # tokens to compute up to which one worker may do both where that is quicker; None: any
    max_prefill_candidates: int = 3  # what a decode worker can fall back on by itself
    max_explained_requests: int = 1000  # remembered for `tandem explain`; some 5 KB each
    max_prefix_blocks: int = 1_000_000  # 20 MB of router memory once it is full, 32 million tokens of 32-token blocks
    max_prefix_copies: int = 2  # hot prefixes that are being copied to other nodes at once; 0: none ever is
    prefix_copy_bytes_per_s: float = 2e8  # of all copies, on average: a sixth of a 10 Gbit/s link, which hand-offs need
    stamp_settle_s: float = 5.0  # after this a FINISHED stamp that has not come is given up: 25 reports at 5 Hz
    tick_s: float = 0.05  # how late a queued request's deadline may be noticed
    watch_silence_s: float = 2.5  # twelve reports at 5 Hz missed, two of an idle replica: it hangs
    stream_silence_s: float = 330.0  # between two messages of a stream: beyond what a replica gives its own engine while that computes
    client_stall_s: float = 60.0  # a client that reads nothing for so long holds a slot here and on a replica for nobody
    rebalance_gap_fraction: float = 0.25  # of KV room, between the fullest decode replica and the emptiest; 1: nothing is moved for it
    rebalance_after_s: float = 2.0  # for so long it must have been so, and as long after each move
    reconnect_max_s: float = 0.25  # a replica is back in a second; one that is gone leaves the register, and is tried no more

    def validate(self) -> None:
        """Raises ConfigError naming the setting."""
        for name in (
            "max_queued_requests",
            "max_running_requests",
            "max_prefill_candidates",
            "max_prefix_blocks",
            "max_explained_requests",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_prefill_candidates > MAX_PREFILL_CANDIDATES:
            raise ConfigError(f"max_prefill_candidates must be at most {MAX_PREFILL_CANDIDATES}, got {self.max_prefill_candidates}")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of: {', '.join(POLICIES)}; got {self.policy!r}")
        for name in (
            "retry_budget",
            "retry_hold_s",
            "no_replica_wait_s",
            "cold_start_wait_s",
            "stamp_settle_s",
            "rebalance_after_s",
            "queue_ageing",
            "ahead_s",
            "max_prefix_copies",
        ):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in (
            "tick_s",
            "watch_silence_s",
            "stream_silence_s",
            "client_stall_s",
            "rebalance_gap_fraction",
            "reconnect_max_s",
            "default_ttft_s",
            "prefix_copy_bytes_per_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("handoff_min_tokens", "one_worker_max_tokens"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
