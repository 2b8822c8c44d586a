"""How other routers rank prefill candidates, to compare with. Plain views in, a ranking out.

Must not know the core: whoever calls books the work, and asks anew for each request. Parameters of others are the best found on the
grid of `tandem/sim/grid.py`, which says how they were found.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple
from zlib import crc32

from tandem.domain import ReplicaId

DEFAULT_POLICY = "predicted_ttft"  # the planner's own: the least predicted seconds to the first token


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillJob:
    """A prompt to be placed. `prefill_s(uncached, cached)`: predicted seconds to compute so many tokens on top of so many."""

    prompt_tokens: int
    prefill_s: Callable[[int, int], float]
    session: str = ""
    block_size_tokens: int = 1
    now_s: float = 0.0


class PrefillView(NamedTuple):
    """A candidate as the router sees it. `ahead_*`: what it has accepted or will get before this prompt, as predicted."""

    replica_id: ReplicaId
    cached_tokens: int = 0  # believed leading tokens in its own cache
    ahead_s: float = 0.0
    ahead_tokens: int = 0
    running_requests: int = 0
    queued_requests: int = 0  # of those, not begun
    kv_tokens: int = 0
    kv_room_tokens: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangParameters:
    """SGLang's cache-aware policy: shortest queue where loads differ by more than both, else the longest match above the threshold."""

    match_threshold: float = 0.5
    gap_requests: int = 1
    gap_ratio: float = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoParameters:
    """Dynamo's KV router: blocks to prefill, less a credit for overlap, plus blocks held, plus a weight for each request."""

    prefill_scale: float = 16.0
    overlap_credit: float = 1.0
    request_blocks: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmdParameters:
    """llm-d: weights of scores in 0..1."""

    prefix_weight: float = 3.0
    queue_weight: float = 2.0
    kv_weight: float = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrebleParameters:
    """Preble's E2: how long given work counts, and how uneven loads may be before a hit is given up."""

    window_s: float = 180.0
    uneven_ratio: float = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyParameters:
    """Of all policies that have any."""

    sglang: SglangParameters = field(default_factory=SglangParameters)
    dynamo: DynamoParameters = field(default_factory=DynamoParameters)
    llmd: LlmdParameters = field(default_factory=LlmdParameters)
    preble: PrebleParameters = field(default_factory=PrebleParameters)


@dataclass(slots=True, kw_only=True)
class PolicyState:
    """What a policy remembers from request to request. Mutable; one per router."""

    rng: Random
    parameters: PolicyParameters = field(default_factory=PolicyParameters)
    turn: int = 0
    given_tokens: dict[ReplicaId, int] = field(default_factory=dict)  # uncached tokens ever sent there: the size of its tree
    given_work: dict[ReplicaId, deque[tuple[float, float]]] = field(default_factory=dict)  # when, predicted seconds

    def forget(self, replica_id: ReplicaId) -> None:
        """The replica is gone."""
        self.given_tokens.pop(replica_id, None)
        self.given_work.pop(replica_id, None)


Policy = Callable[[PrefillJob, Sequence[PrefillView], PolicyState], list[int]]
"""Indices into the views, best first; some may be left out. There is at least one view."""


def round_robin(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """Each in its turn."""
    first = state.turn % len(views)
    state.turn += 1
    return [*range(first, len(views)), *range(first)]


def random_choice(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """Any, with equal chances."""
    return state.rng.sample(range(len(views)), len(views))


def power_of_two(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """The better of two at random, by predicted seconds of work."""
    two = state.rng.sample(range(len(views)), min(2, len(views)))
    return _ranked(views, two, lambda view: view.ahead_s)


def least_requests(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """The fewest requests."""
    return _ranked(views, range(len(views)), lambda view: view.running_requests)


def join_shortest_work(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """The fewest predicted seconds of work."""
    return _ranked(views, range(len(views)), lambda view: view.ahead_s)


def session_hash(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """The same for all of a session (highest random weight, so few sessions move where a replica comes or goes); else fewest requests."""
    if not job.session:
        return least_requests(job, views, state)
    return _ranked(views, range(len(views)), lambda view: -crc32(f"{job.session}/{view.replica_id}".encode()))


def lmetric(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """New prefill tokens times batch size (LMetric, arXiv 2603.15202): no weights, no time model, so the fallback without one."""

    def cost(view: PrefillView) -> float:
        return (view.ahead_tokens + _uncached(job, view)) * (view.running_requests + 1)

    return _ranked(views, range(len(views)), cost)


def dynamo_cost(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """NVIDIA Dynamo's KV router: a sum of blocks."""
    given = state.parameters.dynamo

    def cost(view: PrefillView) -> float:
        prefill_tokens = view.ahead_tokens + max(0.0, job.prompt_tokens - given.overlap_credit * view.cached_tokens)
        blocks = (given.prefill_scale * prefill_tokens + view.kv_tokens) / job.block_size_tokens
        return blocks + given.request_blocks * view.running_requests

    return _ranked(views, range(len(views)), cost)


def llmd_weighted(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """llm-d: the largest weighted sum of prefix, queue and KV scores."""
    given = state.parameters.llmd
    fewest, most = min(view.running_requests for view in views), max(view.running_requests for view in views)

    def cost(view: PrefillView) -> float:
        prefix = min(view.cached_tokens, job.prompt_tokens) / job.prompt_tokens
        queue = (most - view.running_requests) / (most - fewest) if most > fewest else 1.0
        kv = 1.0 - min(1.0, view.kv_tokens / view.kv_room_tokens)
        return -(given.prefix_weight * prefix + given.queue_weight * queue + given.kv_weight * kv)

    return _ranked(views, range(len(views)), cost)


def sglang_cache_aware(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """SGLang's router: balance where loads are uneven, else the longest match, else the smallest tree."""
    given, sizes = state.parameters.sglang, state.given_tokens
    fewest, most = min(view.running_requests for view in views), max(view.running_requests for view in views)
    longest = max(view.cached_tokens for view in views)
    if most - fewest > given.gap_requests and most > given.gap_ratio * fewest:
        ranking = _ranked(views, range(len(views)), lambda view: view.running_requests)
    elif longest > given.match_threshold * job.prompt_tokens:
        ranking = _ranked(
            views, range(len(views)), lambda view: (-view.cached_tokens, view.running_requests, sizes.get(view.replica_id, 0))
        )
    else:
        ranking = _ranked(views, range(len(views)), lambda view: sizes.get(view.replica_id, 0))
    chosen = views[ranking[0]]
    sizes[chosen.replica_id] = sizes.get(chosen.replica_id, 0) + _uncached(job, chosen)
    return ranking


def preble_e2(job: PrefillJob, views: Sequence[PrefillView], state: PolicyState) -> list[int]:
    """Preble: exploit where more than half is cached, else explore by the work given in a window plus this prefill.

    Its cost of evicting is left out: no router here is told of it.
    """
    given = state.parameters.preble
    loads = [_window_s(state, view.replica_id, job.now_s - given.window_s) for view in views]
    position = {view.replica_id: index for index, view in enumerate(views)}
    longest = max(view.cached_tokens for view in views)
    holders = [index for index, view in enumerate(views) if view.cached_tokens == longest]

    def load(view: PrefillView) -> float:
        return loads[position[view.replica_id]]

    coolest = min(holders, key=lambda index: loads[index])
    is_uneven = loads[coolest] > given.uneven_ratio * min(loads) + job.prefill_s(job.prompt_tokens, 0)
    if 2 * longest > job.prompt_tokens and not is_uneven:
        others = [index for index in range(len(views)) if index not in holders]
        ranking = _ranked(views, holders, load) + _ranked(views, others, load)
    else:
        ranking = _ranked(views, range(len(views)), lambda view: load(view) + _own_s(job, view))
    chosen = views[ranking[0]]
    state.given_work.setdefault(chosen.replica_id, deque()).append((job.now_s, _own_s(job, chosen)))
    return ranking


PEER_POLICIES: dict[str, Policy] = {
    "lmetric": lmetric,
    "join_shortest_work": join_shortest_work,
    "least_requests": least_requests,
    "power_of_two": power_of_two,
    "round_robin": round_robin,
    "random": random_choice,
    "session_hash": session_hash,
    "sglang_cache_aware": sglang_cache_aware,
    "dynamo_cost": dynamo_cost,
    "llmd_weighted": llmd_weighted,
    "preble_e2": preble_e2,
}
POLICIES = (DEFAULT_POLICY, *PEER_POLICIES)


def _uncached(job: PrefillJob, view: PrefillView) -> int:
    """Tokens to compute there without the store; the last one always is."""
    return max(1, job.prompt_tokens - view.cached_tokens)


def _own_s(job: PrefillJob, view: PrefillView) -> float:
    uncached = _uncached(job, view)
    return job.prefill_s(uncached, job.prompt_tokens - uncached)


def _window_s(state: PolicyState, replica_id: ReplicaId, since_s: float) -> float:
    """Seconds of work given to the replica since then; older entries are forgotten."""
    given = state.given_work.get(replica_id)
    if given is None:
        return 0.0
    while given and given[0][0] < since_s:
        given.popleft()
    return sum(seconds for _, seconds in given)


def _ranked(views: Sequence[PrefillView], indices: Iterable[int], cost: Callable[[PrefillView], float | tuple[float, ...]]) -> list[int]:
    """Least cost first, ties by id. O(n log n)."""
    return [index for _, _, index in sorted((cost(views[index]), views[index].replica_id, index) for index in indices)]
