"""Which blocks a cache holds: least recently used out first, capacity in blocks. Must not hold bytes or know time."""

from collections import OrderedDict
from collections.abc import Sequence

from tandem.domain import BlockHash
from tandem.held_blocks import BlockChange
from tandem.short_hash import SHORT_BYTES

_NO_CHANGE = BlockChange()


class BlockCache:
    """Blocks by their hash. A hash stands for its whole prefix, so only leading blocks count as a match."""

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity_blocks = capacity_blocks
        self._blocks: OrderedDict[BlockHash, None] = OrderedDict()
        self._untold: dict[BlockHash, bool] = {}  # whether it is here now

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def has_changed(self) -> bool:
        """Whether `take_change` has something to tell."""
        return bool(self._untold)

    def match(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are here. Nothing is touched. O(matched)."""
        blocks = self._blocks
        for index, block_hash in enumerate(block_hashes):
            if block_hash not in blocks:
                return index
        return len(block_hashes)

    def put(self, block_hashes: Sequence[BlockHash]) -> None:
        """The chain is here and was just used. Touched from its end, so that its head is evicted last. O(blocks)."""
        blocks, untold = self._blocks, self._untold
        for block_hash in reversed(block_hashes):
            if block_hash in blocks:
                blocks.move_to_end(block_hash)
            else:
                blocks[block_hash] = None
                untold[block_hash] = True
        while len(blocks) > self._capacity_blocks:
            block_hash, _ = blocks.popitem(last=False)
            untold[block_hash] = False

    def take_change(self) -> BlockChange:
        """What came and went since the last time, as caches tell it."""
        untold, self._untold = self._untold, {}
        if not untold:
            return _NO_CHANGE
        return BlockChange(
            removed=b"".join([block[:SHORT_BYTES] for block, is_here in untold.items() if not is_here]),
            stored=b"".join([block[:SHORT_BYTES] for block, is_here in untold.items() if is_here]),
        )
