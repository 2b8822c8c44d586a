"""A real Redis for KV blocks and users of one: `pytest_plugins = ("tests.integration.kv_redis_fixtures",)`."""

from collections.abc import Iterator

import pytest

from kv_transfer.kv_redis_store import KvRedisStore
from tests.kv_redis_talk import MEMORY_BYTES, PAUSE_S, TIMEOUT_S, Open
from tests.lower_tier_benches import CLUSTER, KvRedisServer


@pytest.fixture
def kv_server() -> Iterator[KvRedisServer]:
    made = KvRedisServer(MEMORY_BYTES)
    yield made
    made.close()


@pytest.fixture
def open_store() -> Iterator[Open]:
    stores: list[KvRedisStore] = []

    def open_one(url: str) -> KvRedisStore:
        stores.append(KvRedisStore(url, cluster=CLUSTER, timeout_s=TIMEOUT_S, pause_s=PAUSE_S))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def store(kv_server: KvRedisServer, open_store: Open) -> KvRedisStore:
    return open_store(kv_server.url)
