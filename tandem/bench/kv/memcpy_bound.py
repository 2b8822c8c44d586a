"""The bound: what one thread of numpy slice copies reaches between two buffers that are there already."""

import time

import numpy as np

from tandem.bench.kv.rows import gbps


class MemcpyBound:
    """Copies `buffer_bytes` (256 MiB or more leave no cache in play) from one pre-faulted buffer to another."""

    def __init__(self, buffer_bytes: int) -> None:
        self._source = np.full(buffer_bytes, 1, np.uint8)
        self._target = np.full(buffer_bytes, 2, np.uint8)

    def copy_gbps(self, block_bytes: int) -> float:
        """GB/s (1e9 bytes) of one pass in slices of `block_bytes`."""
        source, target = self._source, self._target
        begin_s = time.perf_counter()
        for start in range(0, len(source), block_bytes):
            target[start : start + block_bytes] = source[start : start + block_bytes]
        return gbps(len(source), time.perf_counter() - begin_s)
