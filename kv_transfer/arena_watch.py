"""What one listener is told of an arena's blocks: the difference between what it was told and what the columns say.

Must not ask anybody or lock anything. There is no queue of events: a listener that is behind is told more later, and nothing is lost.
"""

import numpy as np
import numpy.typing as npt

from kv_transfer.arena import Arena, SlotState
from tandem.domain import Namespace
from tandem.held_blocks import BlockChange

_NAMESPACE_BYTES = 16
_MAX_NAMESPACES = 256  # of one arena; blocks of further ones are not told


class ArenaWatch:
    """One listener. 13 bytes a slot; a look takes about 0.1 ms, in a large arena some milliseconds."""

    def __init__(self, arena: Arena) -> None:
        slots = arena.geometry.num_slots
        self._arena = arena
        self._told = np.zeros(slots, np.uint32)  # generation + 1 of the block that was told; 0: none
        self._hashes = np.zeros(slots, "<u8")  # its short hash
        self._spaces = np.zeros(slots, np.uint8)  # its namespace's number
        self._numbers: dict[bytes, int] = {}
        self.is_behind = False  # there is more to tell

    def look(self, max_blocks: int) -> dict[Namespace, BlockChange]:
        """What is to be told next, at most so many blocks gone and so many new; what has gone comes first."""
        held = self._held()
        gone = np.flatnonzero((self._told != 0) & (held != self._told))
        new = np.flatnonzero((held != 0) & (held != self._told)) if len(gone) <= max_blocks else gone[:0]
        self.is_behind = max(len(gone), len(new)) > max_blocks
        gone, new = gone[:max_blocks], new[:max_blocks]
        removed = self._by_namespace(gone)
        self._told[gone] = 0
        stored = self._by_namespace(self._enter(new, held[new]))
        changes = {}
        for number in removed.keys() | stored.keys():
            came, went = stored.get(number, self._hashes[:0]), removed.get(number, self._hashes[:0])
            if len(came) and len(went):
                went = np.setdiff1d(went, came)  # evicted and put again: in another slot
            changes[self._namespace(number)] = BlockChange(removed=went.tobytes(), stored=came.tobytes())
        return changes

    def _held(self) -> npt.NDArray[np.uint32]:
        """Generation + 1 of the block in each slot, 0 where there is none."""
        generations = self._arena.generation + np.uint32(1)
        generations[self._arena.state != SlotState.COMMITTED] = 0
        return generations

    def _enter(self, slots: npt.NDArray[np.int64], generations: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """Notes the blocks in these slots as told; those that are still the same once their keys were read."""
        keys = np.array(self._arena.records["key"][slots])
        is_same = (self._arena.generation[slots] + np.uint32(1) == generations) & (self._arena.state[slots] == SlotState.COMMITTED)
        slots, keys, generations = slots[is_same], keys[is_same], generations[is_same]
        spaces = [self._number(bytes(key)) for key in keys[:, :_NAMESPACE_BYTES]]
        self._hashes[slots] = np.ascontiguousarray(keys[:, _NAMESPACE_BYTES : _NAMESPACE_BYTES + 8]).view("<u8").reshape(-1)
        self._spaces[slots] = spaces
        self._told[slots] = generations
        return slots

    def _by_namespace(self, slots: npt.NDArray[np.int64]) -> dict[int, "npt.NDArray[np.uint64]"]:
        numbers = self._spaces[slots]
        return {number: self._hashes[slots[numbers == number]] for number in set(numbers.tolist()) if number < _MAX_NAMESPACES - 1}

    def _number(self, namespace: bytes) -> int:
        if namespace not in self._numbers and len(self._numbers) < _MAX_NAMESPACES - 1:
            self._numbers[namespace] = len(self._numbers)
        return self._numbers.get(namespace, _MAX_NAMESPACES - 1)

    def _namespace(self, number: int) -> Namespace:
        return Namespace(list(self._numbers)[number].hex())
