"""Parts of the report beside the table: what pre-faulting costs, engine layouts, other nodes, whether the native part is in use."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from kv_transfer.arena import Arena
from kv_transfer.arena_store import ArenaStore
from tandem.bench.kv.engine_layout import LAYOUTS, engine_like, layout_row, measure_layout
from tandem.bench.kv.options import KvBenchOptions
from tandem.bench.kv.peer_fetch import measure_peer_fetch
from tandem.bench.kv.rows import gbps

Report = dict[str, object]
_LAYOUT_REPETITIONS = 31  # of a millisecond each
_ENGINE_START_S = 120.0


def prefault(options: KvBenchOptions, folder: Path) -> Report:
    """Seconds and GB/s of giving an arena all of its memory, page by page, and of mapping what is there."""
    path = folder / "prefault"
    Arena.create(path, options.capacity_bytes)
    arena, other = Arena(path), Arena(path)
    slabs, total_bytes = range(arena.geometry.num_slabs), arena.geometry.num_slabs * arena.geometry.slab_bytes
    begin_s = time.perf_counter()
    for slab in slabs:
        arena.back(slab)
    backed_s = time.perf_counter()
    for slab in slabs:
        other.populate(slab)
    mapped_s = time.perf_counter()
    arena.close()
    other.close()
    path.unlink()
    return {
        "bytes": total_bytes,
        **{"back_s": backed_s - begin_s, "back_gbps": gbps(total_bytes, backed_s - begin_s)},
        **{"map_s": mapped_s - backed_s, "map_gbps": gbps(total_bytes, mapped_s - backed_s)},
    }


def engine_layout(options: KvBenchOptions, folder: Path) -> list[Report]:
    """Saves and loads of rows as the engine's tensors have them: of a real engine where there is one, and of its layout at other sizes."""
    repetitions = 3 if options.is_quick else _LAYOUT_REPETITIONS
    rows: list[Report] = [] if options.is_quick else [_real_engine(options, folder / "engine", repetitions)]
    for row_bytes, layers in LAYOUTS[:1] if options.is_quick else LAYOUTS:
        like = engine_like(row_bytes, layers)
        where = folder / "layout"
        rows.append(layout_row(like, measure_layout(like, where, repetitions=repetitions, seed=options.seed), "same layout"))
        shutil.rmtree(where)
    return rows


def _real_engine(options: KvBenchOptions, folder: Path, repetitions: int) -> Report:
    job = {"folder": str(folder), "repetitions": repetitions, "seed": options.seed}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tandem.bench.kv.vllm_layout"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=_ENGINE_START_S,
            check=True,
        )
        row: Report = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        return {"kind": "ours", "layout": "engine", "source": "vllm", "error": f"no engine could be measured: {type(error).__name__}"}
    return row


def peer_fetch(options: KvBenchOptions, folder: Path) -> list[Report]:
    """Blocks from another node's arena, beside raw TCP."""
    total_bytes, sizes = (8 << 20, (256 << 10,)) if options.is_quick else (64 << 20, options.block_sizes)
    return [
        measure_peer_fetch(folder / f"peers-{size}", size, total_bytes, repetitions=options.repetitions, seed=options.seed)
        for size in sizes
    ]


def native(options: KvBenchOptions, folder: Path) -> bool:
    """Whether the compiled part does the copying."""
    store = ArenaStore(folder / "native", capacity_bytes=1 << 20)
    try:
        return store.is_native
    finally:
        store.close()
