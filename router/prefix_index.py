"""Which replicas are believed to have computed which leading blocks. A hint: a wrong one costs a recompute.

Must not hash or load blocks. Bounded in blocks, least recently used out first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from tandem.domain import BlockHash, ReplicaId

Holder = tuple[ReplicaId, int]  # with the incarnation: a restarted replica has an empty cache

MAX_HOLDERS_PER_BLOCK = 8


class PrefixIndex:
    """Block hash -> holders, newest holder last."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders: OrderedDict[BlockHash, dict[Holder, None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def record(self, block_hashes: Sequence[BlockHash], holder: Holder) -> None:
        """`holder` has these leading blocks of one prompt now; O(blocks).

        The chain is touched from its end, so that its head, without which the rest is useless, is evicted last.
        """
        for block_hash in reversed(block_hashes[: self._max_blocks]):
            holders = self._holders.setdefault(block_hash, {})
            self._holders.move_to_end(block_hash)
            holders.pop(holder, None)
            holders[holder] = None
            if len(holders) > MAX_HOLDERS_PER_BLOCK:
                del holders[next(iter(holders))]
            if len(self._holders) > self._max_blocks:
                self._holders.popitem(last=False)

    def match(self, block_hashes: Sequence[BlockHash]) -> dict[Holder, int]:
        """How many leading blocks each holder has, holders of none left out; O(matched blocks x holders)."""
        matched: dict[Holder, int] = {}
        for index, block_hash in enumerate(block_hashes):
            holders = self._holders.get(block_hash, {})
            still = [holder for holder in holders if matched.get(holder, 0) == index]
            if not still:
                break
            for holder in still:
                matched[holder] = index + 1
        return matched
