"""Blocks in a real Redis that dies, hangs, is full, evicts or is none: values within the time limit, never a wrong byte."""

import logging
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from threading import Event
from time import monotonic, sleep

import numpy as np
import pytest

from kv_transfer.codec import HEADER_BYTES, pack_header
from kv_transfer.kv_redis_store import KvRedisStore, kv_redis_arguments
from kv_transfer.store import BlockOutcome, PutOutcome
from tandem.errors import ConfigError
from tests.dict_store import NAMESPACE, block_hash, key
from tests.kv_redis_talk import MEMORY_BYTES, PAUSE_S, TIMEOUT_S, Open, is_well_again, payload_of, seems_empty, troubles
from tests.lower_tier_benches import CLUSTER, KvRedisServer, redis_key
from tests.store_benches import OTHER, PAYLOAD, A, B, as_rows, get, put

pytest_plugins = ("tests.integration.kv_redis_fixtures",)


class TestOutages:
    def test_a_server_that_was_killed_is_misses_and_one_log_line(
        self, kv_server: KvRedisServer, store: KvRedisStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        put(store, A)
        kv_server.kill()
        with caplog.at_level(logging.INFO):
            assert seems_empty(store)
            assert seems_empty(store)
        assert store.error
        assert len(troubles(caplog)) == 1
        kv_server.start_again()
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert is_well_again(store)

    def test_a_server_that_starts_late_is_found(self, kv_server: KvRedisServer, store: KvRedisStore) -> None:
        kv_server.kill()
        assert seems_empty(store)
        kv_server.start_again()
        assert is_well_again(store)

    def test_a_server_that_hangs_costs_one_timeout_and_is_not_asked_during_the_pause(
        self, kv_server: KvRedisServer, open_store: Open
    ) -> None:
        store = KvRedisStore(kv_server.url, cluster=CLUSTER, timeout_s=TIMEOUT_S, pause_s=60.0)
        put(store, A)
        os.kill(kv_server.process.pid, signal.SIGSTOP)
        try:
            started_s = monotonic()
            assert get(store, A)[0] is BlockOutcome.MISSING
            hung_s, started_s = monotonic() - started_s, monotonic()
            assert all(seems_empty(store) for _ in range(20))
            assert TIMEOUT_S * 0.9 <= hung_s < 10.0
            assert monotonic() - started_s < 30.0  # 140 calls, 210 s if each was sent
        finally:
            os.kill(kv_server.process.pid, signal.SIGCONT)
            store.close()
        other = open_store(kv_server.url)
        assert get(other, A) == (BlockOutcome.HIT, PAYLOAD)

    def test_a_server_that_goes_on_is_used_again_with_what_it_had(self, kv_server: KvRedisServer, store: KvRedisStore) -> None:
        put(store, A)
        put(store, B, OTHER)
        os.kill(kv_server.process.pid, signal.SIGSTOP)
        assert get(store, A)[0] is BlockOutcome.MISSING
        os.kill(kv_server.process.pid, signal.SIGCONT)
        assert is_well_again(store)
        assert get(store, B) == (BlockOutcome.HIT, OTHER)

    def test_a_server_that_dies_between_two_calls_of_many_threads_ends_none_of_them(
        self, kv_server: KvRedisServer, store: KvRedisStore
    ) -> None:
        at_work = Event()

        def work(seed: int) -> int:
            rng, hits = Random(seed), 0
            for _ in range(300):
                number = rng.randrange(100, 150)  # not those that the last line asks for
                put(store, key(number), payload_of(number, 5_000))
                outcome, payload = get(store, key(number), 5_000)
                assert outcome is not BlockOutcome.CORRUPT
                assert outcome is BlockOutcome.MISSING or payload == payload_of(number, 5_000)
                hits += outcome is BlockOutcome.HIT
                if hits == 10:
                    at_work.set()
            return hits

        with ThreadPoolExecutor(12) as pool:  # more than there are connections
            results = pool.map(work, range(12))
            assert at_work.wait(60.0)
            kv_server.kill()
            sleep(0.1)
            kv_server.start_again()
            assert sum(results) > 0
        assert is_well_again(store)

    def test_nobody_there_is_no_exception(self, tmp_path: Path, open_store: Open) -> None:
        assert seems_empty(open_store(f"unix://{tmp_path}/none.sock"))

    def test_a_wrong_password_is_trouble_that_does_not_tell_it(self, open_store: Open, caplog: pytest.LogCaptureFixture) -> None:
        guarded = KvRedisServer(MEMORY_BYTES)
        guarded.inside.config_set("requirepass", "open-sesame")
        store = open_store(f"{guarded.url}?password=s3cret")
        assert seems_empty(store)
        assert "s3cret" not in store.error + caplog.text
        assert put(open_store(f"{guarded.url}?password=open-sesame"), A) is PutOutcome.STORED
        guarded.kill()
        guarded.close()


def test_a_server_on_tcp_is_as_good(open_store: Open) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    kv_server = KvRedisServer(MEMORY_BYTES, "--port", str(port))
    store = open_store(f"redis://127.0.0.1:{port}/0")
    assert put(store, A) is PutOutcome.STORED
    assert (get(store, A), store.error) == ((BlockOutcome.HIT, PAYLOAD), "")
    kv_server.kill()
    assert seems_empty(store)
    kv_server.close()


class TestMemory:
    def test_a_full_server_evicts_and_takes_new_blocks(self, kv_server: KvRedisServer, store: KvRedisStore) -> None:
        payload_bytes, count = 64 << 10, 600  # more than twice what there is room for
        for number in range(0, count, 20):
            rows = as_rows(*(payload_of(one, payload_bytes) for one in range(number, number + 20)))
            assert store.put(NAMESPACE, [block_hash(one) for one in range(number, number + 20)], rows) == [PutOutcome.STORED] * 20
        rows = np.zeros((count, payload_bytes), np.uint8)
        outcomes = store.get_into(NAMESPACE, [block_hash(number) for number in range(count)], rows)
        hits = [number for number, outcome in enumerate(outcomes) if outcome is BlockOutcome.HIT]
        assert set(outcomes) == {BlockOutcome.HIT, BlockOutcome.MISSING}
        assert 100 < len(hits) < 260
        assert all(rows[number].tobytes() == payload_of(number, payload_bytes) for number in hits)
        stats = store.stats()
        assert stats.capacity_bytes == MEMORY_BYTES
        assert stats.blocks == len(hits)
        assert len(hits) * payload_bytes <= stats.used_bytes <= MEMORY_BYTES

    def test_a_server_without_memory_takes_none_and_still_gives(
        self, kv_server: KvRedisServer, store: KvRedisStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        put(store, A)
        kv_server.inside.config_set("maxmemory-policy", "noeviction")  # what it does when there is nothing to evict
        kv_server.inside.config_set("maxmemory", 1)
        assert {put(store, key(number)) for number in range(2, 50)} == {PutOutcome.NO_ROOM}
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)
        assert "memory" in store.error
        assert len(troubles(caplog)) == 1
        kv_server.inside.config_set("maxmemory", MEMORY_BYTES)
        sleep(PAUSE_S)
        deadline_s = monotonic() + 30.0
        while put(store, B) is not PutOutcome.STORED and monotonic() < deadline_s:
            sleep(0.01)
        assert store.error == ""

    @pytest.mark.parametrize(
        ("name", "value"), [("maxmemory-policy", "noeviction"), ("maxmemory-policy", "volatile-lru"), ("maxmemory", "0")]
    )
    def test_a_server_that_would_not_evict_is_never_written(
        self, kv_server: KvRedisServer, store: KvRedisStore, name: str, value: str
    ) -> None:
        kv_server.inside.config_set(name, value)
        assert {put(store, key(number)) for number in range(5)} == {PutOutcome.NO_ROOM}
        assert "maxmemory" in store.error
        assert kv_server.inside.dbsize() == 0

    def test_a_block_that_would_push_out_most_others_is_not_sent(self, store: KvRedisStore) -> None:
        put(store, A)
        assert put(store, B, bytes(MEMORY_BYTES // 4)) is PutOutcome.NO_ROOM
        assert (get(store, A)[0], store.error) == (BlockOutcome.HIT, "")

    def test_a_batch_of_more_than_one_exchange_is_stored_and_got(self, open_store: Open) -> None:
        kv_server = KvRedisServer(128 << 20)
        store = open_store(kv_server.url)
        payloads = [payload_of(number, 1 << 20) for number in range(20)]
        hashes = [block_hash(number) for number in range(20)]
        assert store.put(NAMESPACE, hashes, as_rows(*payloads)) == [PutOutcome.STORED] * 20
        rows = np.zeros((20, 1 << 20), np.uint8)
        assert store.get_into(NAMESPACE, hashes, rows) == [BlockOutcome.HIT] * 20
        assert [row.tobytes() for row in rows] == payloads
        kv_server.close()

    def test_more_keys_than_one_exchange_holds_are_looked_up(self, store: KvRedisStore) -> None:
        put(store, A)
        hashes = [block_hash(number) for number in range(2_500)]
        assert [number for number, is_held in enumerate(store.contains(NAMESPACE, hashes)) if is_held] == [1]
        assert store.drop(NAMESPACE, hashes) == 1


class TestWhatLiesThere:
    def test_a_block_under_anothers_key_is_corrupt_and_deleted(self, kv_server: KvRedisServer, store: KvRedisStore) -> None:
        kv_server.inside.set(redis_key(A), pack_header(B, PAYLOAD) + PAYLOAD)
        assert get(store, A)[0] is BlockOutcome.CORRUPT
        assert kv_server.inside.dbsize() == 0

    @pytest.mark.parametrize("value", [b"", b"x", bytes(HEADER_BYTES), bytes(HEADER_BYTES + len(PAYLOAD))])
    def test_what_is_no_block_is_corrupt_and_deleted(self, kv_server: KvRedisServer, store: KvRedisStore, value: bytes) -> None:
        kv_server.inside.set(redis_key(A), value)
        assert get(store, A)[0] is BlockOutcome.CORRUPT
        assert put(store, A) is PutOutcome.STORED

    def test_a_value_of_another_type_is_no_block(self, kv_server: KvRedisServer, store: KvRedisStore) -> None:
        kv_server.inside.rpush(redis_key(A), b"x")
        assert get(store, A)[0] is BlockOutcome.MISSING

    def test_clusters_do_not_see_each_others_blocks(self, kv_server: KvRedisServer, store: KvRedisStore) -> None:
        other = KvRedisStore(kv_server.url, cluster="other", timeout_s=TIMEOUT_S)
        put(store, A)
        assert get(other, A)[0] is BlockOutcome.MISSING
        put(other, A, OTHER)
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)
        other.close()


class TestSettings:
    @pytest.mark.parametrize(
        "url", ["", "localhost:6379", "http://u:s3cret@host/", "redis://u:s3cret@host:port/", "redis://u:s3cret@host/x?db=y", "redis://["]
    )
    def test_what_is_no_url_is_a_config_error_that_does_not_tell_the_password(self, url: str) -> None:
        with pytest.raises(ConfigError) as caught:
            KvRedisStore(url, cluster=CLUSTER, timeout_s=1.0)
        assert "s3cret" not in str(caught.value)

    def test_options_that_would_undo_the_time_limits_are_a_config_error(self) -> None:
        with pytest.raises(ConfigError, match=r"not taken here \(retry_on_timeout, socket_timeout\)"):
            KvRedisStore("redis://h?db=0&socket_timeout=60&retry_on_timeout=yes", cluster=CLUSTER, timeout_s=1.0)

    def test_the_server_listens_on_its_socket_alone_and_keeps_nothing(self, kv_server: KvRedisServer) -> None:
        config = {name: kv_server.inside.config_get(name)[name] for name in ("port", "save", "appendonly", "maxmemory", "maxmemory-policy")}
        assert config == {
            "port": "0",
            "save": "",
            "appendonly": "no",
            "maxmemory": str(MEMORY_BYTES),
            "maxmemory-policy": "allkeys-lru",
        }
        path = Path(kv_server.url.removeprefix("unix://"))
        assert path.stat().st_mode & 0o777 == 0o700

    def test_a_socket_path_that_the_kernel_refuses_is_a_config_error(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="too long"):
            kv_redis_arguments(tmp_path / ("x" * 120), tmp_path, MEMORY_BYTES)


def test_a_port_that_nobody_listens_on_is_a_miss(open_store: Open) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert seems_empty(open_store(f"redis://127.0.0.1:{unused.getsockname()[1]}"))
