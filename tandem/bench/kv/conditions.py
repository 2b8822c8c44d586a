"""What a run's figures depend on: the machine, how busy it was before, the settings."""

import os
import platform
import time
from pathlib import Path

import numpy as np

from tandem import __version__
from tandem.bench.kv.options import BATCH_BLOCKS, KvBenchOptions

_LOOK_S = 1.0
_IDLE_COLUMNS = (3, 4)  # of the first line of /proc/stat: idle, iowait


def measure_conditions(options: KvBenchOptions) -> dict[str, object]:
    """Takes a second, in which this process must do nothing else."""
    return {
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_name(),
        "kernel": platform.release(),
        "load_average_1_min": os.getloadavg()[0],
        "busy_fraction": busy_fraction(_LOOK_S),
        "repetitions": options.repetitions,
        "arena_bytes": options.capacity_bytes,
        "repetition_bytes": options.buffer_bytes,
        "memcpy_buffer_bytes": options.memcpy_bytes,
        "batch_blocks": BATCH_BLOCKS,
        "is_quick": options.is_quick,
        "seed": options.seed,
        "python": platform.python_version(),
        "versions": {"tandem": __version__, "numpy": np.__version__},
    }


def busy_fraction(look_s: float) -> float:
    """Share of all cores' time that somebody used during `look_s` from now."""
    busy, total = _times()
    time.sleep(look_s)
    busy_then, total_then = _times()
    return (busy_then - busy) / max(1, total_then - total)


def _times() -> tuple[int, int]:
    ticks = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - sum(ticks[column] for column in _IDLE_COLUMNS), sum(ticks)


def _cpu_name() -> str:
    lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    return next((value.strip() for key, value in lines if key.strip() == "model name"), platform.machine())
