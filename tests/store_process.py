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

from kv_transfer.shm_store import ShmStore
from kv_transfer.store import BlockStore
from tests.dict_store import key

PAYLOAD_BYTES = 4096
BLOCKS = 60
# A third of the blocks, so that eviction is always at work.
CHURN_CAPACITY_BYTES = 20 * PAYLOAD_BYTES

STORES: Mapping[str, Callable[[str], BlockStore]] = {
    "shm": lambda place: ShmStore(Path(place), capacity_bytes=CHURN_CAPACITY_BYTES),
}


def payload_of(number: int) -> bytes:
    """The bytes of block `number`; no two blocks have the same."""
    return hashlib.sha256(number.to_bytes(4, "big")).digest() * (PAYLOAD_BYTES // 32)


def put_all(store: BlockStore) -> Counter[str]:
    """Puts every block once, in order."""
    return Counter(store.put([key(number)], [memoryview(payload_of(number))])[0] for number in range(BLOCKS))


def churn(store: BlockStore) -> Counter[str]:
    """Puts blocks at random and evicts."""
    rng = Random(1)
    counts: Counter[str] = Counter()
    for _ in range(3_000):
        number = rng.randrange(BLOCKS)
        counts[store.put([key(number)], [memoryview(payload_of(number))])[0]] += 1
        if rng.random() < 0.1:
            counts["evicted"] += store.evict()
    return counts


def read(store: BlockStore) -> Counter[str]:
    """Reads blocks at random and compares them with what they must be."""
    rng = Random(2)
    buffer = bytearray(PAYLOAD_BYTES)
    counts: Counter[str] = Counter()
    for _ in range(10_000):
        number = rng.randrange(BLOCKS)
        outcome = store.get_into([key(number)], [memoryview(buffer)])[0]
        counts[outcome] += 1
        counts["wrong"] += outcome == "hit" and bytes(buffer) != payload_of(number)
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
    print(json.dumps(ACTIONS[action](store)), flush=True)


if __name__ == "__main__":
    main()
