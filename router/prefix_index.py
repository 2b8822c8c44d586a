"""Which replicas' engines and which nodes' stores hold which blocks. A hint: a wrong one costs a recompute.

Must not hash or load blocks. Bounded in blocks, least recently used out first, of one chain its end. Knows blocks by 8 bytes of their
hash (`tandem/short_hash.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from router.block_table import BindProbe, BlockTable, Cells
from router.holder_sets import HolderSets
from tandem.domain import BlockHash, Lease, Namespace, ReplicaId
from tandem.held_blocks import BlockChange
from tandem.short_hash import ShortHashes, from_bytes, short_hashes

Holder = tuple[ReplicaId, int]  # with the incarnation: a restarted replica has an empty cache


Blocks = Sequence[BlockHash] | ShortHashes  # of one chain, from its begin


def holder_of(lease: Lease) -> Holder:
    """The replica of a lease."""
    return lease.replica_id, lease.incarnation


class StoreHolder(NamedTuple):
    """A node's store, of whose blocks one namespace belongs to a replica's model."""

    node: str
    namespace: Namespace


_FIRST_BLOCKS = 64  # looked up at first, then four times as many: most prompts share only their begin with others
_FEW_HOLDERS = 8  # bits that are quicker to take one by one
_FEW_KEYS = 256  # that a set tells apart quicker than sorting


class Match(dict[Holder, int]):
    """How many leading blocks of a prompt each replica holds, and each node's store; holders of none are left out."""

    __slots__ = ("stores",)

    def __init__(self) -> None:
        super().__init__()
        self.stores: dict[StoreHolder, int] = {}

    def store_blocks(self, node: str, namespace: Namespace) -> int:
        """Leading blocks in the store of that node."""
        return self.stores.get(StoreHolder(node, namespace), 0)


class PrefixIndex:
    """Blocks to holders. Holders have slots, blocks have sets of slots as bit masks. `bind_probe` makes it quicker."""

    def __init__(self, max_blocks: int, bind_probe: BindProbe | None = None) -> None:
        self._table = BlockTable(max_blocks, bind_probe)
        self._sets = HolderSets()
        self._slots: dict[Holder | StoreHolder, int] = {}
        self._replica_at: dict[int, Holder] = {}  # by slot
        self._store_at: dict[int, StoreHolder] = {}
        self._store_slots = 0  # as bits
        self._free: list[int] = []

    def __len__(self) -> int:
        return self._sets.held_blocks

    @property
    def replicas(self) -> Iterable[Holder]:
        """Replicas that are known as holders."""
        return self._replica_at.values()

    @property
    def num_bytes(self) -> int:
        """Of the table, once every page of it was written to: 20 a block of the bound."""
        return self._table.num_bytes

    @property
    def num_sets(self) -> int:
        """Different sets of holders."""
        return len(self._sets)

    def record(self, blocks: Blocks, *holders: Holder | StoreHolder) -> None:
        """All of `holders` have these blocks of one chain now; O(blocks). They count as used, the chain's begin last."""
        self._add(_keys(blocks), *holders)

    def apply(self, holder: Holder | StoreHolder, stored: ShortHashes, removed: ShortHashes) -> None:
        """What a holder tells of its cache, in either order: no block is in both. About 1 us a block, and 50 us a call."""
        if len(removed) and holder in self._slots:
            self._remove(_distinct(removed), self._slots[holder])
        if len(stored):
            self._add(_distinct(stored), holder)

    def tell(self, holder: Holder | StoreHolder, change: BlockChange) -> None:
        """The same as a message has it."""
        if change.is_cleared:
            self.clear(holder)
        self.apply(holder, from_bytes(change.stored), from_bytes(change.removed))

    def correct(self, block_hashes: Sequence[BlockHash], holder: Holder | StoreHolder, cached_blocks: int) -> None:
        """When it was used, `holder` turned out to have only the first `cached_blocks` of a chain."""
        if holder in self._slots:
            self._remove(short_hashes(block_hashes[cached_blocks:]), self._slots[holder])

    def clear(self, holder: Holder | StoreHolder) -> None:
        """What was known of a holder is void; O(sets of holders). Its blocks stay until they are told anew or evicted."""
        if holder in self._slots:
            self._sets.remove(1 << self._slots[holder])

    def drop(self, holder: Holder | StoreHolder) -> None:
        """The holder is gone for ever; O(sets of holders). Nothing where it is not known."""
        self.clear(holder)
        slot = self._slots.pop(holder, None)
        if slot is not None:
            self._replica_at.pop(slot, None)
            self._store_at.pop(slot, None)
            self._store_slots &= ~(1 << slot)
            self._free.append(slot)

    def drop_node(self, node: str) -> None:
        """The same for all that the node's store holds."""
        for holder in [holder for holder in self._slots if isinstance(holder, StoreHolder) and holder.node == node]:
            self.drop(holder)

    def match(self, blocks: Blocks) -> Match:
        """Leading blocks by holder, every one of them looked up; O(matched blocks). About 0.1 ms for 2,048 blocks."""
        keys = _keys(blocks)
        found, begin, size, still, last = Match(), 0, _FIRST_BLOCKS, 0, -1
        while begin < len(keys):
            numbers = self._table.look_up(keys[begin : begin + size])
            changes = (numbers[1:] != numbers[:-1]).nonzero()[0] + 1
            for offset, number in ((0, int(numbers[0])), *zip(changes.tolist(), numbers[changes].tolist(), strict=True)):
                if number == last:
                    continue
                last, mask = number, self._sets.mask(number)
                if begin + offset == 0:
                    still = mask
                elif still & ~mask:
                    self._put(found, still & ~mask, begin + offset)
                    still &= mask
                if not still:
                    return found
            begin, size = begin + size, 4 * size
        self._put(found, still, len(keys))
        return found

    def _put(self, found: Match, mask: int, blocks: int) -> None:
        """The holders of `mask` have that many leading blocks."""
        stores = mask & self._store_slots
        for slot in _slots_in(mask ^ stores):
            found[self._replica_at[slot]] = blocks
        if stores:
            for slot in _slots_in(stores):
                found.stores[self._store_at[slot]] = blocks

    def _add(self, keys: ShortHashes, *holders: Holder | StoreHolder) -> None:
        bits = 0
        for holder in holders:
            bits |= 1 << self._slot(holder)
        cells, evicted = self._table.claim(keys)
        self._sets.forget(evicted.tolist())
        self._change(cells, lambda mask: mask | bits)

    def _remove(self, keys: ShortHashes, slot: int) -> None:
        bit = 1 << slot
        self._change(self._table.find(keys), lambda mask: mask & ~bit)

    def _change(self, cells: Cells, changed: Callable[[int], int]) -> None:
        """What most news is of is known already: of those blocks nothing changes."""
        numbers = self._sets.change(self._table.numbers[cells], changed)
        if numbers is not None:
            self._table.set_numbers(cells, numbers)

    def _slot(self, holder: Holder | StoreHolder) -> int:
        slot = self._slots.get(holder)
        if slot is None:
            slot = self._slots[holder] = self._free.pop() if self._free else len(self._slots)
            if isinstance(holder, StoreHolder):
                self._store_at[slot] = holder
                self._store_slots |= 1 << slot
            else:
                self._replica_at[slot] = holder
        return slot

    def check_invariants(self) -> None:
        """Raises AssertionError where tables and counts disagree; O(bound)."""
        numbers = self._table.numbers
        self._sets.check_invariants(Counter(numbers[numbers != 0].tolist()))


def _keys(blocks: Blocks) -> ShortHashes:
    return blocks if isinstance(blocks, np.ndarray) else short_hashes(blocks)


def _distinct(keys: ShortHashes) -> ShortHashes:
    """Each once, in the order of their first."""
    if len(keys) <= _FEW_KEYS and len(set(keys.tolist())) == len(keys):
        return keys
    _, first = np.unique(keys, return_index=True)
    return keys if len(first) == len(keys) else keys[np.sort(first)]


def _slots_in(mask: int) -> list[int]:
    if mask.bit_count() <= _FEW_HOLDERS:
        slots = []
        while mask:
            low = mask & -mask
            slots.append(low.bit_length() - 1)
            mask ^= low
        return slots
    octets = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8, "little"), np.uint8)
    found: list[int] = np.flatnonzero(np.unpackbits(octets, bitorder="little")).tolist()
    return found
