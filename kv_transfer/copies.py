"""The store's inner loops, by name: gather into slots, scatter out of them, look up, commit, index, remove.

In C where it was compiled (`native_copies.py`), else in numpy (`numpy_copies.py`); both do the same, and a test holds them to it.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kv_transfer.store import Bytes

Slots = npt.NDArray[np.int32]
BlockIds = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]
Outcomes = npt.NDArray[np.uint8]
HIT, MISSING, CORRUPT = range(3)
COMMITTED, EXISTS, NO_CELL, LOST = range(4)


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Where blocks lie outside the store: one view (num_blocks, row_bytes) a layer, each row contiguous; a block is its rows in order."""

    views: tuple[Bytes, ...]
    payload_bytes: int = field(init=False)  # of one block

    def __post_init__(self) -> None:
        object.__setattr__(self, "payload_bytes", sum(view.shape[1] for view in self.views))


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What a scatter found, one entry a key: outcome, slot (-1: none) and the slot's generation at that time."""

    outcomes: npt.NDArray[np.uint8]
    slots: Slots
    generations: npt.NDArray[np.uint32]


class Copies(Protocol):
    """The inner loops over one arena."""

    is_native: bool

    def gather(self, slots: Slots, slot_bytes: int, rows: BlockRows, block_ids: BlockIds) -> Sums:
        """Copies block i into slot i of this process; the checksums (0 where they are off). Shorter where a slot is not of that size."""

    def scatter(self, keys: Bytes, rows: BlockRows, block_ids: BlockIds, now_ms: int, *, only_leading: bool) -> Read:
        """Copies the block of key i to block id i, checks generation and checksum after it. What is no HIT may be written in part."""

    def lookup(self, keys: Bytes) -> Slots:
        """Committed slot of each key (n, 48), or -1. A hint: `scatter` checks."""

    def commit(
        self, slots: Slots, keys: Bytes, sums: Sums, payload_bytes: int, first_position: int, tenant: int, writer: int, now_ms: int
    ) -> Outcomes:
        """Writes the records of filled slots and makes them visible: COMMITTED, EXISTS, NO_CELL or LOST each.

        LOST: the slot is not granted any more. Under the arena's lock.
        """

    def index(self, slots: Slots) -> Outcomes:
        """Enters slots with records into the index, as `commit` does."""

    def remove(self, slots: Slots) -> None:
        """Takes slots out of the index by the keys in their records. Under the arena's lock."""

    def fence(self) -> None:
        """What was stored before is seen before what is stored after."""
