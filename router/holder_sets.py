"""Sets of holders as bit masks, each kept once and known by a small number: thousands of blocks have the same holders.

Must not know which blocks: it counts them only, so that a set that no block has any more is forgotten.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from router.block_table import Numbers

NOBODY = 0  # the number of the empty set


class HolderSets:
    """Masks by number. Bit `1 << slot` stands for the holder in that slot."""

    def __init__(self) -> None:
        self._masks: list[int] = [0]
        self._blocks: list[int] = [0]  # that have the set; not counted for NOBODY
        self._numbers: dict[int, int] = {0: NOBODY}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._masks) - len(self._free) - 1

    @property
    def held_blocks(self) -> int:
        """Blocks that somebody has; O(sets)."""
        return sum(blocks for blocks, mask in zip(self._blocks, self._masks, strict=True) if mask)

    def mask(self, number: int) -> int:
        """The set's bits."""
        return self._masks[number]

    def change(self, numbers: Numbers, changed: Callable[[int], int]) -> Numbers | None:
        """The blocks that had these sets have others now, `changed` of each mask: the new numbers, None where nothing changes.

        O(blocks), the masks O(sets).
        """
        if not len(numbers):
            return None
        first = int(numbers[0])
        if (numbers == first).all():  # as blocks of one chain mostly have
            old = self._masks[first]
            mask = changed(old)
            if mask == old:
                return None
            number = self._add(mask, len(numbers))
            self._release(first, len(numbers))
            return np.full(len(numbers), number, np.uint32)
        listed = numbers.tolist()
        counts = Counter(listed)
        new = {number: self._add(changed(self._masks[number]), blocks) for number, blocks in counts.items()}
        for number, blocks in counts.items():
            self._release(number, blocks)
        return np.array([new[number] for number in listed], np.uint32)

    def forget(self, numbers: Sequence[int]) -> None:
        """Blocks that had these sets are gone."""
        if any(numbers):
            for number, blocks in Counter(numbers).items():
                self._release(number, blocks)

    def remove(self, bit: int) -> None:
        """Takes one holder out of every set; O(sets). Two sets may become the same one, under two numbers."""
        for number, mask in enumerate(self._masks):
            if mask & bit:
                if self._numbers.get(mask) == number:
                    del self._numbers[mask]
                self._masks[number] = mask ^ bit
                self._numbers.setdefault(mask ^ bit, number)

    def _add(self, mask: int, blocks: int) -> int:
        number = self._numbers.get(mask)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._masks[number] = mask
            else:
                number = len(self._masks)
                self._masks.append(mask)
                self._blocks.append(0)
            self._numbers[mask] = number
        if number != NOBODY:
            self._blocks[number] += blocks
        return number

    def _release(self, number: int, blocks: int) -> None:
        if number == NOBODY:
            return
        self._blocks[number] -= blocks
        if not self._blocks[number]:
            mask = self._masks[number]
            if self._numbers.get(mask) == number:
                del self._numbers[mask]
            self._masks[number] = 0
            self._free.append(number)

    def check_invariants(self, blocks_by_number: "Counter[int]") -> None:
        """Raises AssertionError where the counts are not those of the blocks (NOBODY left out)."""
        counted = {number: blocks for number, blocks in enumerate(self._blocks) if blocks}
        assert counted == dict(blocks_by_number), "the sets count other blocks than there are"
        assert set(self._free).isdisjoint(counted), "a set is free and in use"
        assert all(self._masks[number] == mask for mask, number in self._numbers.items()), "a mask is known by a wrong number"
