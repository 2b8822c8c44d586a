"""Bytes that are new in every repetition and that another process can check without being sent them.

Both sides draw the same base from a seed (once, untimed). Repetition `stamp` is the base with every 64-bit word XORed by a number made
of the stamp: one pass at memory speed changes every word, no two blocks are alike, and what an earlier repetition left never passes for
this one.
Standard library and numpy only.
"""

import numpy as np
from numpy.typing import NDArray

_ODD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: every stamp changes about half of the bits
_WORD = (1 << 64) - 1
WORD_BYTES = 8


def _mask(stamp: int) -> np.uint64:
    return np.uint64((stamp + 1) * _ODD & _WORD)


class FreshRows:
    """The contents of one side's `buffer` (uint8, its length a multiple of 8)."""

    def __init__(self, buffer: NDArray[np.uint8], seed: int) -> None:
        self._words = buffer.view(np.uint64)
        self._seed = seed
        self._stamp: int | None = None  # what the buffer holds
        self._base: NDArray[np.uint64] | None = None  # of a side that checks

    def fill(self, stamp: int) -> None:
        """Writes repetition `stamp` over the whole buffer; one pass in place after the first time."""
        if self._stamp is None:
            self._words[:] = self._draw()
            delta = _mask(stamp)
        else:
            delta = _mask(self._stamp) ^ _mask(stamp)
        np.bitwise_xor(self._words, delta, out=self._words)
        self._stamp = stamp

    def wrong_blocks(self, stamp: int, blocks: int, block_bytes: int) -> int:
        """How many of the first `blocks` rows are not, byte for byte, those of repetition `stamp`."""
        if self._base is None:
            self._base = self._draw()
        words = block_bytes // WORD_BYTES
        expected = np.empty(words, np.uint64)
        wrong = 0
        for start in range(0, blocks * words, words):
            np.bitwise_xor(self._base[start : start + words], _mask(stamp), out=expected)
            wrong += not np.array_equal(expected, self._words[start : start + words])
        return wrong

    def _draw(self) -> NDArray[np.uint64]:
        return np.random.default_rng(self._seed).integers(0, _WORD, size=len(self._words), dtype=np.uint64, endpoint=True)
