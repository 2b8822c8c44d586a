"""A run of blocks in one side's buffer, and the batches it is moved in. Pure.

Standard library only: an interpreter of another environment, where a peer is installed, imports this file too.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`blocks` blocks of `block_bytes`, row i at byte i * block_bytes of the buffer, under key number `first` + i in `store`."""

    first: int
    blocks: int
    block_bytes: int
    batch_blocks: int
    store: str = ""

    @property
    def total_bytes(self) -> int:
        """Of all its blocks."""
        return self.blocks * self.block_bytes

    def batches(self) -> Iterator[tuple[range, int]]:
        """Key numbers of each batch, and the byte of the buffer where its first row starts; the last batch may be shorter."""
        for start in range(0, self.blocks, self.batch_blocks):
            stop = min(start + self.batch_blocks, self.blocks)
            yield range(self.first + start, self.first + stop), start * self.block_bytes

    def as_json(self) -> dict[str, object]:
        """What `Span(**...)` takes."""
        return asdict(self)
