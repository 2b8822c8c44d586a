"""The blocks that a cache holds now, and what each listener has not been told of them yet.

Must not know whose cache or who listens. Blocks are short hashes (`short_hash.py`). What is not told is bounded: a listener that reads
too slowly is told all of it anew, never less.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from tandem.short_hash import split

# For one listener; beyond, a new snapshot is shorter. A dict of that size takes 5 MB.
_MAX_UNTOLD_BLOCKS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChange:
    """A cache's changes: 8 bytes a block, joined. Where `is_cleared`, nothing that was told before counts any more.

    No block is both removed and stored.
    """

    is_cleared: bool = False
    removed: bytes = b""
    stored: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.is_cleared or self.removed or self.stored)


class BlockTeller:
    """What one listener is to be told next: first all that is held, in pieces, then what changed since."""

    def __init__(self, held: dict[bytes, None], max_untold_blocks: int) -> None:
        self._held = held
        self._max_untold_blocks = max_untold_blocks
        self._snapshot: list[bytes] = []  # the next ones last
        self._is_stored: dict[bytes, bool] = {}
        self._is_cleared = False
        self._begin()

    @property
    def is_behind(self) -> bool:
        """Whether not all was told yet that is held: `take` again soon."""
        return bool(self._snapshot)

    def note(self, change: BlockChange) -> None:
        """The cache, whose blocks are those of after the change, has changed."""
        if change.is_cleared:
            self._begin()
            return
        for block in split(change.removed):
            self._is_stored[block] = False
        for block in split(change.stored):
            self._is_stored.pop(block, None)  # to its end: blocks are told in the order in which they were stored
            self._is_stored[block] = True
        if len(self._is_stored) > self._max_untold_blocks:
            self._begin()

    def take(self, max_blocks: int) -> BlockChange:
        """The next `max_blocks` at most; a change that is false where there is nothing to tell."""
        is_cleared, self._is_cleared = self._is_cleared, False
        if self._snapshot:
            piece = self._snapshot[-max_blocks:]
            del self._snapshot[-max_blocks:]
            return BlockChange(is_cleared=is_cleared, stored=b"".join(block for block in reversed(piece) if block in self._held))
        told = dict(islice(self._is_stored.items(), max_blocks))
        for block in told:
            del self._is_stored[block]
        removed = b"".join(block for block, is_stored in told.items() if not is_stored)
        stored = b"".join(block for block, is_stored in told.items() if is_stored)
        return BlockChange(is_cleared=is_cleared, removed=removed, stored=stored)

    def _begin(self) -> None:
        """All of it anew."""
        self._is_cleared = True
        self._snapshot = list(reversed(self._held))
        self._is_stored.clear()


class HeldBlocks:
    """One cache's blocks, in the order in which they were stored. About 100 bytes a block."""

    def __init__(self, max_untold_blocks: int = _MAX_UNTOLD_BLOCKS) -> None:
        self._held: dict[bytes, None] = {}
        self._tellers: list[BlockTeller] = []
        self._max_untold_blocks = max_untold_blocks

    def __len__(self) -> int:
        return len(self._held)

    def apply(self, change: BlockChange) -> None:
        """The cache has changed; O(changed blocks x listeners)."""
        if change.is_cleared:
            self._held.clear()
        for block in split(change.removed):
            self._held.pop(block, None)
        self._held.update(dict.fromkeys(split(change.stored)))
        for teller in self._tellers:
            teller.note(change)

    @contextmanager
    def listen(self) -> Iterator[BlockTeller]:
        """Somebody is told for as long as the context lasts, of what is held now to begin with."""
        teller = BlockTeller(self._held, self._max_untold_blocks)
        self._tellers.append(teller)
        try:
            yield teller
        finally:
            self._tellers.remove(teller)
