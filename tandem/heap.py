"""Memory that a process has freed and the allocator keeps.

Must not be called where a millisecond counts.
"""

import ctypes
import gc


def trim_heap() -> None:
    """Collects garbage and gives free pages back to the kernel (malloc_trim(3)); takes some milliseconds. For the end of a long start."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
