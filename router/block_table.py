"""A table of fixed size from short block hashes to small numbers, looked up thousands at a time.

Each block may be in either of two rows of 8 cells, and goes into the emptier one. Where both are full the cell of the 16 that was used
longest ago is taken, so nothing ever grows, moves or waits: no call does work for any block but its own. 20 bytes a cell.

Must not load what is compiled: a `BindProbe` is given to it, and without one numpy does the work.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tandem.short_hash import ShortHashes

_WAYS = 8
_HALF_BITS = np.uint64(32)
_LOWER_HALF = np.uint64(0xFFFF_FFFF)

Cells = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.uint32]
# Of keys (n,) in a table: the cell of each, or any of its rows, and its number, or 0.
Probe = Callable[[ShortHashes], tuple[Cells, Numbers]]
BindProbe = Callable[[ShortHashes, Numbers], Probe]  # to a table's keys and numbers, (rows, 8) each
_NONE_EVICTED: Numbers = np.zeros(0, np.uint32)


class BlockTable:
    """Up to `max_blocks` blocks. Nothing is evicted before about nine in ten cells are taken; then what is among the oldest tenth."""

    def __init__(self, max_blocks: int, bind_probe: BindProbe | None = None) -> None:
        self._ways = min(_WAYS, max_blocks)
        num_rows = max(1, max_blocks // self._ways)
        self._num_rows = np.uint64(num_rows)
        shape = (num_rows, self._ways)
        self._keys = np.zeros(shape, np.uint64)
        self._numbers = np.zeros(shape, np.uint32)
        self._used = np.zeros(shape, np.int64)  # when, in blocks used so far; 0: empty
        self._probe = bind_probe(self._keys, self._numbers) if bind_probe is not None and self._ways == _WAYS else None
        self._key_of, self._number_of, self._used_of = self._keys.reshape(-1), self._numbers.reshape(-1), self._used.reshape(-1)
        self._clock = 0

    @property
    def num_bytes(self) -> int:
        """Of the columns; pages that no block was put into take no memory yet."""
        return self._keys.nbytes + self._numbers.nbytes + self._used.nbytes

    @property
    def numbers(self) -> Numbers:
        """Of all cells (cells,), 0 where there is none: a view."""
        return self._number_of

    def look_up(self, keys: ShortHashes) -> Numbers:
        """The number of each block, 0 where it is not there; about 30 ns a block and 5 us a call, without a probe 80 ns and 20 us."""
        if self._probe is not None:
            return self._probe(keys)[1]
        cells = self._likely(keys)
        numbers: Numbers = self._number_of.take(cells)
        numbers *= self._key_of.take(cells) == keys
        return numbers

    def find(self, keys: ShortHashes) -> Cells:
        """The cells of those blocks that are there."""
        cells = self._likely(keys)
        found: Cells = cells[self._key_of.take(cells) == keys]
        return found

    def claim(self, keys: ShortHashes) -> tuple[Cells, Numbers]:
        """Cells for different blocks of one chain, and the numbers of those that were evicted. The first of the chain counts as used last.

        Blocks that would be the oldest of their rows at once get no cell.
        """
        count = len(keys)
        self._clock += count
        stamps = np.arange(self._clock, self._clock - count, -1)
        cells = self._likely(keys)
        is_there = self._key_of.take(cells) == keys
        if is_there.all():
            self._used_of[cells] = stamps
            return cells, _NONE_EVICTED
        self._used_of[cells[is_there]] = stamps[is_there]
        missing, rows = (~is_there).nonzero()[0], self._rows(keys)
        evicted: list[Numbers] = []
        while len(missing):
            chosen, oldest = missing, self._oldest(rows[missing])
            missing = missing[:0]
            if len(set(oldest.tolist())) < len(oldest):  # each cell once in a round
                oldest, first = np.unique(oldest, return_index=True)
                chosen, missing = chosen[first], np.delete(chosen, first)
            is_newer = self._used_of[oldest] < stamps[chosen]
            if not is_newer.all():
                chosen, oldest = chosen[is_newer], oldest[is_newer]
            evicted.append(self._number_of[oldest])
            self._key_of[oldest] = keys[chosen]
            self._number_of[oldest] = 0
            self._used_of[oldest] = stamps[chosen]
            cells[chosen] = oldest
        # Where rows are full, a block may have taken the cell of one farther down the chain.
        is_there = self._key_of.take(cells) == keys
        return cells if is_there.all() else cells[is_there], evicted[0] if len(evicted) == 1 else np.concatenate(evicted)

    def set_numbers(self, cells: Cells, numbers: Numbers) -> None:
        """What these cells stand for from now on; a cell of number 0 is the first to be taken."""
        self._number_of[cells] = numbers
        is_empty = numbers == 0
        if is_empty.any():
            self._used_of[cells[is_empty]] = 0

    def _rows(self, keys: ShortHashes) -> Cells:
        """The two rows of each block (n, 2): by the upper and the lower half of its hash, scaled."""
        halves = np.empty((len(keys), 2), np.uint64)
        np.right_shift(keys, _HALF_BITS, out=halves[:, 0])
        np.bitwise_and(keys, _LOWER_HALF, out=halves[:, 1])
        halves *= self._num_rows
        halves >>= _HALF_BITS
        return halves.view(np.int64)

    def _likely(self, keys: ShortHashes) -> Cells:
        """The cell of each block if it is there, else any of its rows."""
        if self._probe is not None:
            return self._probe(keys)[0]
        rows = self._rows(keys)
        both = self._keys.take(rows, axis=0).reshape(len(keys), 2 * self._ways)
        return self._cells(rows, (both == keys[:, None]).argmax(axis=1))

    def _oldest(self, rows: Cells) -> Cells:
        """Of the two rows of each: an empty cell of the one that has more of them, else the cell that was used longest ago."""
        used = self._used.take(rows, axis=0)
        is_empty = used == 0
        used -= is_empty * is_empty.sum(axis=2, keepdims=True)
        return self._cells(rows, used.reshape(len(rows), 2 * self._ways).argmin(axis=1))

    def _cells(self, rows: Cells, ways: Cells) -> Cells:
        """The cell of each way counted through its two rows."""
        cells: Cells = np.where(ways < self._ways, rows[:, 0], rows[:, 1] - 1)
        cells *= self._ways
        cells += ways
        return cells
