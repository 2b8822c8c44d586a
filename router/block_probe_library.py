"""The compiled part of `block_table.py`, where it was compiled (`block_probe.c`).

Must not hold a table: it is given one with each call.
"""

import ctypes

import numpy as np

from router.block_table import Cells, Numbers, Probe
from tandem.compiled import try_load
from tandem.short_hash import ShortHashes

_ABI = 1
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


def load_probe() -> Probe | None:
    """None where there is none for us."""
    # It keeps the interpreter's lock: a call takes microseconds, getting the lock back may take more.
    library = try_load("router.block_probe", "tandem_block_probe_abi", _ABI, ctypes.PyDLL)
    if library is None:
        return None
    call = library.tandem_block_probe
    call.argtypes = (_POINTER, _POINTER, ctypes.c_uint64, _POINTER, _SIZE, _POINTER, _POINTER)
    call.restype = None

    def probe(table: ShortHashes, table_numbers: Numbers, keys: ShortHashes) -> tuple[Cells, Numbers]:
        keys = np.ascontiguousarray(keys)
        cells, numbers = np.empty(len(keys), np.int64), np.empty(len(keys), np.uint32)
        call(
            table.ctypes.data,
            table_numbers.ctypes.data,
            len(table),
            keys.ctypes.data,
            len(keys),
            cells.ctypes.data,
            numbers.ctypes.data,
        )
        return cells, numbers

    return probe
