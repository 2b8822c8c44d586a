"""The compiled part of `block_table.py`, where it was compiled (`block_probe.c`).

Must not change a table. It knows where a table lies in memory: a table's columns never move.
"""

import ctypes

import numpy as np

from router.block_table import BindProbe, Cells, Numbers, Probe
from tandem.compiled import try_load
from tandem.short_hash import ShortHashes

_ABI = 1
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


def load_probe() -> BindProbe | None:
    """None where there is none for us."""
    # It keeps the interpreter's lock: a call takes microseconds, getting the lock back may take more.
    library = try_load("router.block_probe", "tandem_block_probe_abi", _ABI, ctypes.PyDLL)
    if library is None:
        return None
    call = library.tandem_block_probe
    call.argtypes = (_POINTER, _POINTER, ctypes.c_uint64, _POINTER, _SIZE, _POINTER, _POINTER)
    call.restype = None

    def bind(table: ShortHashes, table_numbers: Numbers) -> Probe:
        # Asked for once: numpy takes longer to tell an address than a small look-up takes. The table owns the probe, and so outlives it.
        table_at, table_numbers_at, num_rows = table.ctypes.data, table_numbers.ctypes.data, len(table)

        def probe(keys: ShortHashes) -> tuple[Cells, Numbers]:
            count = len(keys)
            cells, numbers = np.empty(count, np.int64), np.empty(count, np.uint32)
            if count:
                call(table_at, table_numbers_at, num_rows, keys.tobytes(), count, _address(cells), _address(numbers))
            return cells, numbers

        return probe

    return bind


def _address(array: Cells | Numbers) -> int:
    """Of an array that may be written to and is not empty."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
