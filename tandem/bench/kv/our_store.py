"""Our store as a side: `python -m tandem.bench.kv.our_store`. Of the bench, the only file that knows how the store is called."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.arena_store import ArenaStore
from kv_transfer.store import BlockOutcome, PutOutcome
from tandem.bench.kv.side import Calls, Side, prefaulted, run_side
from tandem.bench.kv.span import Span
from tandem.domain import BlockHash, Namespace

_NAMESPACE = Namespace(hashlib.sha256(b"tandem kv bench").hexdigest()[:32])


def _hash(number: int) -> BlockHash:
    return BlockHash(hashlib.sha256(number.to_bytes(8, "big")).digest())


class OurAdapter:
    """Any number of stores by name, one buffer."""

    def __init__(self, buffer_bytes: int) -> None:
        self.buffer = prefaulted(buffer_bytes)
        self._stores: dict[str, ArenaStore] = {}

    def open(self, store: str, settings: dict[str, Any]) -> None:
        """`settings`: folder, capacity_bytes, checksum."""
        self._stores[store] = ArenaStore(Path(settings["folder"]), capacity_bytes=settings["capacity_bytes"], checksum=settings["checksum"])

    def puts(self, span: Span) -> Calls:
        """Keys and rows made before."""
        return [partial(self._stores[span.store].put, _NAMESPACE, keys, rows) for keys, rows in self._batches(span)]

    def bad_puts(self, outcomes: Sequence[list[PutOutcome]], span: Span) -> int:
        """All but STORED."""
        return sum(outcome is not PutOutcome.STORED for batch in outcomes for outcome in batch)

    def gets(self, span: Span) -> Calls:
        """Keys and rows made before."""
        return [partial(self._stores[span.store].get_into, _NAMESPACE, keys, rows) for keys, rows in self._batches(span)]

    def bad_gets(self, outcomes: Sequence[list[BlockOutcome]], span: Span) -> int:
        """All but HIT."""
        return sum(outcome is not BlockOutcome.HIT for batch in outcomes for outcome in batch)

    def lookup(self, numbers: Sequence[int], store: str) -> Callable[[], list[bool]]:
        """One `contains`."""
        return partial(self._stores[store].contains, _NAMESPACE, [_hash(number) for number in numbers])

    def drop(self, span: Span) -> None:
        """Through the store."""
        self._stores[span.store].drop(_NAMESPACE, [_hash(number) for numbers, _ in span.batches() for number in numbers])

    def shut(self, store: str) -> None:
        """Closes it; the folder is the bench's."""
        self._stores.pop(store).close()

    def _batches(self, span: Span) -> list[tuple[list[BlockHash], NDArray[np.uint8]]]:
        return [
            (
                [_hash(number) for number in numbers],
                self.buffer[start : start + len(numbers) * span.block_bytes].reshape(len(numbers), span.block_bytes),
            )
            for numbers, start in span.batches()
        ]


def _make(config: dict[str, Any]) -> tuple[Side, dict[str, Any]]:
    return Side(OurAdapter(config["buffer_bytes"]), config["seed"]), {}


if __name__ == "__main__":
    run_side(_make)
