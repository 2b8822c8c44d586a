"""Which prefixes are to be copied to another node's store: those whose holders' queues cost requests more than a copy takes.

Must not copy, nor choose where requests run: it sees each choice that was made, and says which copy is due.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from router.config import RouterConfig
from router.instructions import CopyPrefix
from router.placement import Assignment, Considered
from router.policies import DEFAULT_POLICY
from router.predict import LoadPredictor
from router.tracked import Tracked
from tandem.domain import BlockHash, Lease, Namespace
from tandem.lru import Lru

_LEAST_BLOCKS = 4  # of a prefix: fewer are computed as quickly as a copy is begun
_MOST_BLOCKS = 16_384  # that a store takes in one call
_MAX_PREFIXES = 4096  # remembered, some 200 bytes each
_HALF_LIFE_S = 10.0  # of what is remembered of a prefix
_LEAST_REQUESTS = 4.0  # that lost time, and
_LEAST_AGE_S = 2.0  # since the first of them: one busy moment copies nothing
_FORGOTTEN_REQUESTS = 0.25  # two half-lives after the only one
_SETTLE_S = 1.0  # after a copy: the store's Watch stream tells of it within 0.25 s
_PAUSE_S = 10.0  # after one that failed


@dataclass(slots=True)
class _Heat:
    """What one prefix has cost lately: requests that lost time, and the seconds they lost, both fading."""

    requests: float = 0.0
    lost_s: float = 0.0
    since_s: float = 0.0
    updated_s: float = 0.0

    def add(self, lost_s: float, now_s: float) -> None:
        """One more request."""
        fading = 0.5 ** ((now_s - self.updated_s) / _HALF_LIFE_S)
        self.requests *= fading
        self.lost_s *= fading
        if self.requests < _FORGOTTEN_REQUESTS:
            self.requests, self.lost_s, self.since_s = 0.0, 0.0, now_s
        self.requests += 1.0
        self.lost_s += lost_s
        self.updated_s = now_s

    def is_hot(self, copy_s: float, now_s: float) -> bool:
        """Whether a copy that takes so long is worth it."""
        return self.lost_s >= copy_s and self.requests >= _LEAST_REQUESTS and now_s - self.since_s >= _LEAST_AGE_S


class _Loss(NamedTuple):
    """What one request lost because only the nodes that queue hold its prefix."""

    seconds: float
    source_node: str
    source_blocks: int
    target: Lease
    target_blocks: int


class HotPrefixes:
    """Prefixes by their last block. Without two nodes with a store it remembers nothing and asks for nothing.

    A request whose best holder's worker has A seconds of work ahead, where the best worker of a node that has not the prefix has B, and
    would take M seconds longer to fetch or to compute it, waits min(A - B, M) seconds longer than if that node had it too: it runs on
    the holder (A - B), or has been placed elsewhere already (M).
    """

    def __init__(self, config: RouterConfig, predictor: LoadPredictor) -> None:
        self._config = config
        self._predictor = predictor
        self._is_off = config.policy != DEFAULT_POLICY or not config.max_prefix_copies
        self._nodes: frozenset[str] = frozenset()
        self._heats: Lru[tuple[Namespace, BlockHash], _Heat] = Lru(_MAX_PREFIXES, _Heat)
        self._running: set[str] = set()  # nodes that are being copied to
        self._resting_until_s: dict[str, float] = {}  # by node that was copied to
        self._next_s = 0.0  # before this another copy would be more bytes a second than may be

    @property
    def copying(self) -> frozenset[str]:
        """Nodes that are being copied to."""
        return frozenset(self._running)

    def stores_known(self, nodes: Collection[str]) -> None:
        """The nodes that have a store service now."""
        self._nodes = frozenset(nodes)
        self._resting_until_s = {node: until_s for node, until_s in self._resting_until_s.items() if node in self._nodes}

    def note(self, tracked: Tracked, assignment: Assignment | None, now_s: float) -> list[CopyPrefix]:
        """A worker was chosen for a prompt: counts what its prefix cost it; at most one copy, where one is due. O(log(blocks))."""
        loss = None if assignment is None or self._is_off or len(self._nodes) < 2 else self._loss(assignment)
        if loss is None:
            return []
        due_blocks, block_hashes = 0, tracked.block_hashes
        lease, lacking_blocks = loss.target, loss.source_blocks - loss.target_blocks
        for blocks in _depths(loss.target_blocks, loss.source_blocks):
            heat = self._heats.obtain((lease.namespace, block_hashes[blocks - 1]))
            heat.add(loss.seconds * (blocks - loss.target_blocks) / lacking_blocks, now_s)
            size_bytes = (blocks - loss.target_blocks) * lease.engine.kv_block_bytes
            if heat.is_hot(self._predictor.transfer_s(lease.model, size_bytes=size_bytes, is_same_node=False), now_s):
                due_blocks = blocks
        if not due_blocks or not self._may_copy_to(lease.node, now_s):
            return []
        for blocks in _depths(0, due_blocks):
            self._heats.discard((lease.namespace, block_hashes[blocks - 1]))
        size_bytes = (due_blocks - loss.target_blocks) * lease.engine.kv_block_bytes
        self._next_s = now_s + size_bytes / self._config.prefix_copy_bytes_per_s
        self._running.add(lease.node)
        copy = CopyPrefix(
            request_id=tracked.request.request_id,
            namespace=lease.namespace,
            block_hashes=tuple(block_hashes[:due_blocks]),
            source_node=loss.source_node,
            target_node=lease.node,
        )
        return [copy]

    def ended(self, copy: CopyPrefix, now_s: float, *, is_whole: bool) -> None:
        """The copy has ended; `is_whole`: all its blocks are there now. Nothing goes to that node again for a while."""
        self._running.discard(copy.target_node)
        if copy.target_node in self._nodes:
            self._resting_until_s[copy.target_node] = now_s + (_SETTLE_S if is_whole else _PAUSE_S)

    def _may_copy_to(self, node: str, now_s: float) -> bool:
        if node in self._running or len(self._running) >= self._config.max_prefix_copies:
            return False
        return now_s >= self._next_s and now_s >= self._resting_until_s.get(node, 0.0)

    def _loss(self, assignment: Assignment) -> _Loss | None:
        """None where the prompt would have been no quicker with its prefix on one more node."""
        namespace, model = assignment.worker.namespace, assignment.worker.model
        stored = {
            store.node: blocks for store, blocks in assignment.stored.items() if store.namespace == namespace and store.node in self._nodes
        }
        most, source_node = max(((blocks, node) for node, blocks in stored.items()), default=(0, ""))
        most = min(most, _MOST_BLOCKS)
        if most < _LEAST_BLOCKS or not self._predictor.scores.is_trusted(model):
            return None
        holders = {node for node, blocks in stored.items() if 2 * blocks > most}
        considered = [one for one in assignment.considered if one.lease.namespace == namespace]
        near = _best([one for one in considered if one.lease.node in holders])
        far = _best([one for one in considered if one.lease.node in self._nodes - holders])
        if near is None or far is None:
            return None
        seconds = min(near.ahead_s - far.ahead_s, far.wait_s + far.own_s - near.own_s)
        return None if seconds <= 0 else _Loss(seconds, source_node, most, far.lease, stored.get(far.lease.node, 0))


def _best(considered: Collection[Considered]) -> Considered | None:
    return min(considered, key=lambda one: (one.total_s, one.lease.replica_id), default=None)


def _depths(above_blocks: int, most_blocks: int) -> list[int]:
    """Where a prefix of `most_blocks` may be common to several prompts: powers of two, and its end.

    Prompts that go on differently after a common begin count together up to the last power of two within it.
    """
    depths, blocks = list[int](), _LEAST_BLOCKS
    while blocks < most_blocks:
        if blocks > above_blocks:
            depths.append(blocks)
        blocks *= 2
    return [*depths, most_blocks]
