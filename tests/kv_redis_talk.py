"""What tests say to a block store in Redis, and how they tell whether it is in trouble."""

from collections.abc import Callable
from random import Random
from time import monotonic, sleep

import pytest

from kv_transfer.kv_redis_store import KvRedisStore
from kv_transfer.store import BlockOutcome, PutOutcome
from tests.dict_store import NAMESPACE
from tests.store_benches import PAYLOAD, A, B, get, held, put

MEMORY_BYTES = 16 << 20
TIMEOUT_S = 1.5
PAUSE_S = 0.2
Open = Callable[[str], KvRedisStore]


def payload_of(number: int, payload_bytes: int) -> bytes:
    return Random(number).randbytes(payload_bytes)


def seems_empty(store: KvRedisStore) -> bool:
    """Whether it answers each call as a store does that has nothing and takes nothing."""
    stats = store.stats()
    return (
        get(store, A)[0] is BlockOutcome.MISSING
        and put(store, B) is PutOutcome.NO_ROOM
        and held(store, [A, B]) == [False, False]
        and store.payload_bytes(NAMESPACE, A.block_hash) is None
        and store.drop(NAMESPACE, [A.block_hash]) == 0
        and store.make_room() == 0
        and (stats.blocks, stats.used_bytes, stats.capacity_bytes) == (0, 0, 0)
    )


def is_well_again(store: KvRedisStore) -> bool:
    """Whether it takes a block once its pauses are over."""
    deadline_s = monotonic() + 30.0
    while monotonic() < deadline_s:
        if put(store, A) is not PutOutcome.NO_ROOM:
            return store.error == "" and get(store, A) == (BlockOutcome.HIT, PAYLOAD)
        sleep(0.01)
    return False


def troubles(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("kv_tier_trouble")]
