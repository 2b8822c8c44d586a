"""What is broken, how, and in which order: a function of the seed. Must not know processes, nor when a fault has recovered.

A *row* is one of ARCHITECTURE.md's table of promises (section 7) or a part that it implies; an *action* is one way to break it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from types import MappingProxyType


class Row(StrEnum):
    """The part that is broken."""

    PREFILL = "prefill_worker"
    DECODE = "decode_worker"
    PREFILL_POOL = "all_prefill_workers"
    DECODE_POOL = "all_decode_workers"
    STORE = "store_service"
    BLOCK = "block"
    REDIS = "redis"
    ROUTER = "router"
    NETWORK = "client_network"
    AUTOSCALER = "autoscaler"
    ACTOR = "supervising_actor"
    RAY_HEAD = "ray_head"
    ZYGOTE = "zygote"
    NODE_AGENT = "node_agent"
    CLIENT = "client"


class Action(StrEnum):
    """What is done to it. Of a worker, `core` is its engine's process."""

    KILL = "kill"
    KILL_CORE = "kill_core"
    KILL_GCS = "kill_gcs"
    KILL_RAYLET = "kill_raylet"
    STOP = "stop"
    STOP_CORE = "stop_core"
    SLOW = "slow"
    DELAY = "delay"
    BLACK_HOLE = "black_hole"
    RESET = "reset"
    FLIP = "flip"
    CANCEL = "cancel"


Pair = tuple[Row, Action]

# Longer than a lease (3 s) and than any watchdog's patience, so that a stopped process is missed, not only late.
HOLD_S: Mapping[Action, float] = MappingProxyType(
    {Action.STOP: 8.0, Action.STOP_CORE: 8.0, Action.SLOW: 6.0, Action.DELAY: 5.0, Action.BLACK_HOLE: 6.0}
)

ALL_PAIRS: tuple[Pair, ...] = (
    *((Row.PREFILL, action) for action in (Action.KILL, Action.KILL_CORE, Action.STOP, Action.STOP_CORE)),
    *((Row.DECODE, action) for action in (Action.KILL, Action.KILL_CORE, Action.STOP, Action.STOP_CORE, Action.SLOW)),
    (Row.PREFILL_POOL, Action.KILL),
    (Row.DECODE_POOL, Action.KILL),
    *((row, action) for row in (Row.STORE, Row.REDIS, Row.ROUTER) for action in (Action.KILL, Action.STOP)),
    *((Row.NETWORK, action) for action in (Action.DELAY, Action.BLACK_HOLE, Action.RESET)),
    (Row.BLOCK, Action.FLIP),
    *((row, Action.KILL) for row in (Row.AUTOSCALER, Row.ACTOR, Row.ZYGOTE, Row.NODE_AGENT)),
    *((Row.RAY_HEAD, action) for action in (Action.KILL_GCS, Action.KILL_RAYLET)),
    (Row.CLIENT, Action.CANCEL),
)
QUICK_PAIRS: tuple[Pair, ...] = ((Row.STORE, Action.KILL), (Row.BLOCK, Action.FLIP), (Row.CLIENT, Action.CANCEL))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    """One fault. `pick` (0 to below 1) chooses among equals; `lull_s` of load pass before it; what is held ends after `hold_s`."""

    number: int
    row: Row
    action: Action
    hold_s: float
    pick: float
    lull_s: float

    @property
    def pair(self) -> Pair:
        """What it covers."""
        return self.row, self.action

    def choose(self, names: Sequence[str]) -> str | None:
        """One of the names, the same for the same seed; None where there are none."""
        return sorted(names)[int(self.pick * len(names))] if names else None


def plan_faults(seed: int, *, pairs: Iterable[Pair] = ALL_PAIRS, rounds: int = 2, lull_s: float = 1.0) -> tuple[PlannedFault, ...]:
    """Each pair once a round, in an order of its own each round: a run that is cut short has covered as much as it could."""
    rng, planned = Random(f"faults {seed}"), list[PlannedFault]()
    for _ in range(rounds):
        for row, action in rng.sample(order := tuple(pairs), len(order)):
            fault = PlannedFault(
                number=len(planned),
                row=row,
                action=action,
                hold_s=HOLD_S.get(action, 0.0),
                pick=rng.random(),
                lull_s=lull_s * (0.5 + rng.random()),
            )
            planned.append(fault)
    return tuple(planned)
