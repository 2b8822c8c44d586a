"""The KV blocks of the simulated engine: who holds them, and which hashes they keep after that. No bytes.

Must not know requests: whoever takes a block gives it back.
"""

from collections import OrderedDict
from collections.abc import Sequence

from tandem.domain import BlockHash
from tandem.held_blocks import BlockChange, HeldBlocks
from tandem.short_hash import SHORT_BYTES


class BlockPool:
    """`num_blocks` blocks. A block that nobody holds keeps its hash until it is allocated, the least recently used one first."""

    def __init__(self, num_blocks: int) -> None:
        self._holders = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        self.held = HeldBlocks()  # for those who want to know
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to go first

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds, cached ones among them."""
        return len(self._free)

    @property
    def used_fraction(self) -> float:
        """Of all blocks, those that somebody holds."""
        return 1.0 - len(self._free) / len(self._holders)

    def cached(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks of the leading hashes that are here."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def new_holders(self, block_ids: Sequence[int]) -> int:
        """How many of these nobody holds: holding them takes as many of the free ones."""
        return sum(not self._holders[block_id] for block_id in block_ids)

    def hold(self, block_ids: Sequence[int]) -> None:
        """One more holder for each."""
        for block_id in block_ids:
            if not self._holders[block_id]:
                del self._free[block_id]
            self._holders[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Free blocks for one holder, without their hashes. Raises KeyError where there are not as many."""
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._forget(block_id)
            self._holders[block_id] = 1
        return block_ids

    def name(self, block_id: int, block_hash: BlockHash) -> None:
        """The block holds what this hash stands for. Of two equal blocks the first is found."""
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block_id
            self._hashes[block_id] = block_hash
            self.held.apply(BlockChange(stored=block_hash[:SHORT_BYTES]))

    def give_back(self, block_ids: Sequence[int]) -> None:
        """One holder less for each; of a chain the last block goes first."""
        for block_id in reversed(block_ids):
            self._holders[block_id] -= 1
            if not self._holders[block_id]:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def check_invariants(self) -> None:
        """What must hold between any two calls; O(blocks). Raises AssertionError."""
        assert all(holders >= 0 for holders in self._holders), "a block was given back too often"
        assert set(self._free) == {block_id for block_id, holders in enumerate(self._holders) if not holders}, "free and held overlap"
        assert all(self._hashes[block_id] == block_hash for block_hash, block_id in self._by_hash.items()), "a hash names another block"

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self.held.apply(BlockChange(removed=block_hash[:SHORT_BYTES]))
            self._hashes[block_id] = None
