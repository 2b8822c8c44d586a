"""Mooncake (daemon and shared memory) as a side. Standard library, numpy and mooncake only: it runs in the interpreter that has Mooncake.

Buffers come from the pool that the daemon maps too; others it does not accept (reference: stores, section 3).
"""

import ctypes
import importlib.metadata
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tandem.bench.kv.side import Calls, Side, run_side
from tandem.bench.kv.span import Span

_LOCAL_BYTES = 16 << 20
_SLACK_BYTES = 32 << 20  # of the pool, for its own alignment
_PACKAGES = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")


class MooncakeAdapter:
    """One client of the daemon, one registered buffer."""

    def __init__(self, address: str, buffer_bytes: int) -> None:
        import numpy as np
        from mooncake.store import MooncakeDistributedStore

        self._store = MooncakeDistributedStore()
        if status := self._store.setup_dummy(buffer_bytes + _SLACK_BYTES, _LOCAL_BYTES, address):
            raise RuntimeError(f"setup_dummy gave {status}")
        self._pointer = self._store.alloc_from_mem_pool(buffer_bytes)
        if status := self._store.register_buffer(self._pointer, buffer_bytes):
            raise RuntimeError(f"register_buffer gave {status}")
        self.buffer = np.ctypeslib.as_array((ctypes.c_uint8 * buffer_bytes).from_address(self._pointer))
        self.buffer[:] = 1

    def open(self, store: str, settings: dict[str, Any]) -> None:
        """Nothing: there is one."""

    def puts(self, span: Span) -> Calls:
        """`batch_put_from`."""
        return [partial(self._store.batch_put_from, *batch) for batch in self._batches(span)]

    def bad_puts(self, outcomes: Sequence[list[int]], span: Span) -> int:
        """All but 0."""
        return sum(status != 0 for batch in outcomes for status in batch)

    def gets(self, span: Span) -> Calls:
        """`batch_get_into`."""
        return [partial(self._store.batch_get_into, *batch) for batch in self._batches(span)]

    def bad_gets(self, outcomes: Sequence[list[int]], span: Span) -> int:
        """All that are not of the size asked for."""
        return sum(size_bytes != span.block_bytes for batch in outcomes for size_bytes in batch)

    def lookup(self, numbers: Sequence[int], store: str) -> Callable[[], list[bool]]:
        """One `batch_is_exist`."""
        keys = [str(number) for number in numbers]
        return lambda: [found == 1 for found in self._store.batch_is_exist(keys)]

    def drop(self, span: Span) -> None:
        """All there is: a list of keys would be refused while their leases last."""
        self._store.remove_all(True)

    def shut(self, store: str) -> None:
        """Nothing: the daemon ends."""

    def _batches(self, span: Span) -> list[tuple[list[str], list[int], list[int]]]:
        return [
            (
                [str(number) for number in numbers],
                [self._pointer + start + index * span.block_bytes for index in range(len(numbers))],
                [span.block_bytes] * len(numbers),
            )
            for numbers, start in span.batches()
        ]


def _version() -> str:
    for name in _PACKAGES:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _make(config: dict[str, Any]) -> tuple[Side, dict[str, Any]]:
    return Side(MooncakeAdapter(config["address"], config["buffer_bytes"]), config["seed"]), {"version": _version()}


def main() -> None:
    """Serves as a side."""
    run_side(_make)
