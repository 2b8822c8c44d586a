"""What vLLM's own prefix cache stores and removes, noted where it happens inside the engine core, and carried out with a step's stats.

Must not be imported where vLLM is not installed. vLLM's own events (`enable_kv_cache_events`) would copy each block's tokens and need a
socket of their own.
"""

from collections.abc import Mapping

from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

from tandem.held_blocks import BlockChange
from tandem.short_hash import SHORT_BYTES

BLOCK_STATS = "tandem_blocks"  # the key under which changes travel in SchedulerStats.kv_connector_stats
_FIRST_GROUP = bytes(4)  # a key is a hash and the number of its cache group: of a model with several the first speaks for all


class BlockEvents:
    """The changes of one block pool since they were last taken. Costs about 0.4 us a block."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._is_stored: dict[bytes, bool] = {}
        self._is_cleared = False
        pool.cached_block_hash_to_block = _NotedMap(self._is_stored)

    def was_reset(self) -> None:
        """The pool has forgotten all its blocks, and has a new map."""
        self._is_stored.clear()
        self._is_cleared = True
        self._pool.cached_block_hash_to_block = _NotedMap(self._is_stored)

    def take(self) -> BlockChange:
        """Changes since the last call: of each block the last one."""
        change = BlockChange(
            is_cleared=self._is_cleared,
            removed=b"".join(block for block, is_stored in self._is_stored.items() if not is_stored),
            stored=b"".join(block for block, is_stored in self._is_stored.items() if is_stored),
        )
        self._is_stored.clear()
        self._is_cleared = False
        return change


class _NotedMap(BlockHashToBlockMap):
    """vLLM's map of cached blocks, through which every change of its prefix cache goes."""

    def __init__(self, is_stored: dict[bytes, bool]) -> None:
        super().__init__()
        self._is_stored = is_stored

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock) -> None:
        super().insert(key, block)
        if key.endswith(_FIRST_GROUP):
            self._is_stored[key[:SHORT_BYTES]] = True

    def pop(self, key: BlockHashWithGroupId, block_id: int) -> KVCacheBlock | None:
        block = super().pop(key, block_id)
        if block is not None and key not in self._cache and key.endswith(_FIRST_GROUP):  # another block may have the same hash
            self._is_stored[key[:SHORT_BYTES]] = False
        return block


def with_blocks(stats: dict[str, object] | None, change: BlockChange) -> dict[str, object]:
    """What SchedulerStats.kv_connector_stats is to hold; `take_blocks` takes it out again."""
    values = {"is_cleared": change.is_cleared, "removed": change.removed, "stored": change.stored}
    return {**(stats or {}), BLOCK_STATS: values}


def take_blocks(stats: dict[str, object] | None) -> tuple[BlockChange, dict[str, object] | None]:
    """The changes that came with a step's stats, and the stats without them."""
    if stats is None or BLOCK_STATS not in stats:
        return BlockChange(), stats
    others = {key: value for key, value in stats.items() if key != BLOCK_STATS}
    values = stats[BLOCK_STATS]
    assert isinstance(values, Mapping)
    return BlockChange(**values), others or None
