"""A process that is killed or stopped while it has part in an arena: `python -m tests.arena_process FOLDER ACTION`.

Says "ready" once it is where it is to be found, and waits for the end of stdin.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kv_transfer.arena import SlabState
from kv_transfer.arena_lock import ArenaLock
from kv_transfer.arena_store import ArenaStore
from kv_transfer.copies import BlockRows
from tests.dict_store import NAMESPACE, block_hash
from tests.layers import ROOT

CAPACITY_BYTES = 1 << 20
PAYLOAD_BYTES = 1024
GRANTED, STAGED = 24, 5  # slots


def payload_of(number: int) -> bytes:
    return number.to_bytes(4, "big") * (PAYLOAD_BYTES // 4)


def _stage(folder: Path) -> object:
    """A writer with granted slots, some of them filled and not committed, and a block of its own."""
    store = ArenaStore(folder, capacity_bytes=CAPACITY_BYTES)
    rows = np.stack([np.frombuffer(payload_of(number), np.uint8) for number in range(STAGED)])
    store.put(NAMESPACE, [block_hash(1_000)], rows[:1])
    assert store.prepare(PAYLOAD_BYTES, GRANTED) >= GRANTED
    staged = store.stage(NAMESPACE, [block_hash(number) for number in range(STAGED)], BlockRows((rows,)), np.arange(STAGED))
    assert len(staged.slots) == STAGED
    return store, staged


def _back(folder: Path) -> object:
    """A writer in the middle of giving a slab its memory."""
    store = ArenaStore(folder, capacity_bytes=CAPACITY_BYTES)
    assert store.room.back_slab()
    store.arena.slab_state[0] = SlabState.BACKING
    return store


def _hold_lock(folder: Path) -> object:
    lock = ArenaLock(folder)
    assert lock.acquire(10.0)
    return lock


_ACTIONS: Mapping[str, Callable[[Path], object]] = {"stage": _stage, "back": _back, "hold_lock": _hold_lock}


@contextmanager
def running(folder: Path, action: str) -> Iterator["subprocess.Popen[str]"]:
    """Such a process, killed at the end at the latest."""
    command = [sys.executable, "-m", "tests.arena_process", str(folder), action]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Runs one action."""
    folder, action = sys.argv[1:]
    kept = _ACTIONS[action](Path(folder))
    print("ready", flush=True)
    sys.stdin.read()
    del kept


if __name__ == "__main__":
    main()
