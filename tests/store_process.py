"""One of several processes on one store: `python -m tests.store_process KIND PLACE ACTION`.

Says "ready", waits for a line on stdin, works, then says what came of it as one line of JSON.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import numpy as np

from kv_transfer.arena_store import ArenaStore
from kv_transfer.store import BlockStore
from tests.dict_store import NAMESPACE, block_hash

PAYLOAD_BYTES = 65_536
BLOCKS = 60
# 16 blocks, about a quarter of them, so that eviction is always at work.
CHURN_CAPACITY_BYTES = 1 << 20

STORES: Mapping[str, Callable[[str], BlockStore]] = {
    "arena": lambda place: ArenaStore(Path(place), capacity_bytes=CHURN_CAPACITY_BYTES),
    "arena-numpy": lambda place: ArenaStore(Path(place), capacity_bytes=CHURN_CAPACITY_BYTES, native=False),
}


def payload_of(number: int) -> bytes:
    """The bytes of block `number`; no two blocks have the same."""
    return hashlib.sha256(number.to_bytes(4, "big")).digest() * (PAYLOAD_BYTES // 32)


def _put(store: BlockStore, numbers: list[int]) -> list[str]:
    rows = np.stack([np.frombuffer(payload_of(number), np.uint8) for number in numbers])
    return [str(outcome) for outcome in store.put(NAMESPACE, [block_hash(number) for number in numbers], rows)]


def put_all(store: BlockStore) -> Counter[str]:
    """Puts every block once, in order."""
    return Counter(_put(store, [number])[0] for number in range(BLOCKS))


def churn(store: BlockStore) -> Counter[str]:
    """Puts blocks at random, a few at a time, and makes room."""
    rng = Random(1)
    counts: Counter[str] = Counter()
    for _ in range(1_000):
        counts.update(_put(store, rng.sample(range(BLOCKS), rng.randrange(1, 4))))
        if rng.random() < 0.1:
            counts["evicted"] += store.make_room()
    return counts


def read(store: BlockStore) -> Counter[str]:
    """Reads blocks at random and compares them with what they must be."""
    rng = Random(2)
    rows = np.zeros((2, PAYLOAD_BYTES), np.uint8)
    expected = [payload_of(number) for number in range(BLOCKS)]
    counts: Counter[str] = Counter()
    for _ in range(5_000):
        numbers = rng.sample(range(BLOCKS), 2)
        outcomes = store.get_into(NAMESPACE, [block_hash(number) for number in numbers], rows)
        counts.update(str(outcome) for outcome in outcomes)
        for number, outcome, row in zip(numbers, outcomes, rows, strict=True):
            counts["wrong"] += outcome == "hit" and row.tobytes() != expected[number]
        if rng.random() < 0.01:
            store.stats()
    return counts


ACTIONS = {"put_all": put_all, "churn": churn, "read": read}


def main() -> None:
    """Runs one action."""
    kind, place, action = sys.argv[1:]
    store = STORES[kind](place)
    print("ready", flush=True)
    sys.stdin.readline()
    counts = ACTIONS[action](store)
    store.close()
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
