"""What every block store keeps to. A new store adds a bench to BENCHES, and a kind to tests/store_process.py where processes share it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kv_transfer.blocks import BlockKey
from kv_transfer.store import BlockOutcome, PutOutcome
from tests.dict_store import key
from tests.layers import ROOT
from tests.store_benches import BENCHES, OTHER, PAYLOAD, SHARED_BY_PROCESSES, A, B, Bench, get, put
from tests.store_process import BLOCKS, PAYLOAD_BYTES, payload_of


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return BENCHES[request.param](tmp_path)


class TestPutAndGet:
    def test_what_was_put_is_got(self, bench: Bench) -> None:
        assert put(bench.open(), A) is PutOutcome.STORED
        assert get(bench.open(), A) == (BlockOutcome.HIT, PAYLOAD)

    def test_an_empty_block_is_a_block(self, bench: Bench) -> None:
        assert put(bench.open(), A, b"") is PutOutcome.STORED
        assert get(bench.open(), A, 0) == (BlockOutcome.HIT, b"")

    def test_blocks_of_several_namespaces_are_kept_apart(self, bench: Bench) -> None:
        store = bench.open()
        elsewhere = BlockKey(type(A.namespace)("ff" * 16), A.block_hash)
        put(store, A)
        put(store, elsewhere, OTHER)
        assert get(store, A)[1] == PAYLOAD
        assert get(store, elsewhere)[1] == OTHER

    def test_a_missing_block_is_a_value(self, bench: Bench) -> None:
        store = bench.open()
        put(store, B)
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert store.contains([A, B, A]) == [False, True, False]

    def test_a_second_put_finds_the_block(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A)
        assert put(bench.open(), A, OTHER) is PutOutcome.EXISTS
        assert get(store, A)[1] == PAYLOAD

    def test_a_batch_answers_for_each_block_in_order(self, bench: Bench) -> None:
        store = bench.open()
        put(store, B)
        assert store.put([A, B], [memoryview(PAYLOAD), memoryview(PAYLOAD)]) == [PutOutcome.STORED, PutOutcome.EXISTS]
        buffers = [memoryview(bytearray(len(PAYLOAD))) for _ in range(3)]
        assert store.get_into([A, key(3), B], buffers) == [BlockOutcome.HIT, BlockOutcome.MISSING, BlockOutcome.HIT]
        assert [bytes(buffer) == PAYLOAD for buffer in buffers] == [True, False, True]

    def test_empty_batches_are_fine(self, bench: Bench) -> None:
        store = bench.open()
        assert (store.contains([]), store.put([], []), store.get_into([], [])) == ([], [], [])

    def test_stats_count_the_visible_blocks(self, bench: Bench) -> None:
        store = bench.open()
        assert (store.stats().blocks, store.stats().used_bytes) == (0, 0)
        put(store, A)
        put(store, B)
        stats = store.stats()
        assert stats.blocks == 2
        assert stats.used_bytes == len(bench.raw(A)) + len(bench.raw(B))
        assert stats.capacity_bytes >= stats.used_bytes


class TestReservations:
    def test_an_uncommitted_block_is_invisible(self, bench: Bench) -> None:
        store = bench.open()
        reservation = store.try_reserve(A, len(PAYLOAD))
        assert reservation is not None
        for _ in range(2):
            assert store.contains([A]) == [False]
            assert get(store, A)[0] is BlockOutcome.MISSING
            assert store.stats().blocks == 0
            reservation.write(memoryview(PAYLOAD))
        reservation.abort()

    def test_a_committed_block_is_visible_to_all(self, bench: Bench) -> None:
        reservation = bench.open().try_reserve(A, len(PAYLOAD))
        assert reservation is not None
        reservation.write(memoryview(PAYLOAD))
        reservation.commit()
        assert get(bench.open(), A) == (BlockOutcome.HIT, PAYLOAD)
        assert bench.leftovers() == []

    @pytest.mark.parametrize("is_written", [False, True])
    def test_an_aborted_one_leaves_nothing(self, bench: Bench, is_written: bool) -> None:
        store = bench.open()
        reservation = store.try_reserve(A, len(PAYLOAD))
        assert reservation is not None
        if is_written:
            reservation.write(memoryview(PAYLOAD))
        reservation.abort()
        assert store.contains([A]) == [False]
        assert bench.leftovers() == []
        assert put(store, A) is PutOutcome.STORED

    def test_the_same_block_can_be_reserved_by_many(self, bench: Bench) -> None:
        store = bench.open()
        reservations = [user.try_reserve(A, len(PAYLOAD)) for user in (store, store, bench.open())]
        for reservation in reservations:
            assert reservation is not None
            reservation.write(memoryview(PAYLOAD))
            reservation.commit()
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)
        assert store.stats().blocks == 1

    def test_a_put_without_room_leaves_nothing(self, bench: Bench) -> None:
        with bench.full() as store:
            outcome = put(store, A)
        assert outcome is PutOutcome.NO_ROOM
        assert store.contains([A]) == [False]
        assert store.stats().blocks == 0
        assert bench.leftovers() == []


class TestDamage:
    def test_a_flipped_byte_anywhere_is_corrupt_and_then_missing(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A, PAYLOAD[:32])
        stored = bench.raw(A)
        for position in range(len(stored)):
            bench.set_raw(A, stored[:position] + bytes([stored[position] ^ 0x10]) + stored[position + 1 :])
            assert get(store, A, 32)[0] is BlockOutcome.CORRUPT, position
            assert get(store, A, 32)[0] is BlockOutcome.MISSING
            assert store.contains([A]) == [False]

    @pytest.mark.parametrize("kept_bytes", [0, 1, 40, -1])
    def test_a_truncated_block_is_corrupt_and_then_missing(self, bench: Bench, kept_bytes: int) -> None:
        store = bench.open()
        put(store, A)
        bench.set_raw(A, bench.raw(A)[:kept_bytes])
        assert [get(store, A)[0] for _ in range(2)] == [BlockOutcome.CORRUPT, BlockOutcome.MISSING]

    @pytest.mark.parametrize("added_bytes", [1, 10_000])
    def test_a_block_that_is_too_long_is_corrupt_and_then_missing(self, bench: Bench, added_bytes: int) -> None:
        store = bench.open()
        put(store, A)
        bench.set_raw(A, bench.raw(A) + bytes(added_bytes))
        assert [get(store, A)[0] for _ in range(2)] == [BlockOutcome.CORRUPT, BlockOutcome.MISSING]

    @pytest.mark.parametrize("wanted_bytes", [len(PAYLOAD) - 1, len(PAYLOAD) + 1])
    def test_a_block_of_another_size_than_the_buffer_is_corrupt(self, bench: Bench, wanted_bytes: int) -> None:
        store = bench.open()
        put(store, A)
        assert get(store, A, wanted_bytes)[0] is BlockOutcome.CORRUPT

    def test_a_block_under_the_wrong_name_is_corrupt(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A)
        put(store, B, OTHER)
        bench.set_raw(B, bench.raw(A))
        assert get(store, B)[0] is BlockOutcome.CORRUPT
        assert get(store, A)[0] is BlockOutcome.HIT

    def test_a_quarantined_block_can_be_put_again(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A)
        store.quarantine(A)
        store.quarantine(A)
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert put(store, A) is PutOutcome.STORED
        assert get(store, A)[0] is BlockOutcome.HIT


class TestEviction:
    @pytest.fixture
    def block_bytes(self, bench: Bench) -> int:
        put(bench.open(), A)
        block_bytes = len(bench.raw(A))
        bench.open().quarantine(A)
        return block_bytes

    def test_nothing_is_dropped_within_the_capacity(self, bench: Bench, block_bytes: int) -> None:
        store = bench.open(10 * block_bytes)
        for number in range(10):
            put(store, key(number))
        assert store.evict() == 0
        assert store.stats().blocks == 10

    def test_the_least_recently_used_go_down_to_the_low_watermark(self, bench: Bench, block_bytes: int) -> None:
        store = bench.open(20 * block_bytes)
        for number in range(21):
            put(store, key(number))
            bench.set_age_s(key(number), 100.0 - number)
        assert store.evict() == 3
        assert store.contains([key(number) for number in range(21)]) == [number >= 3 for number in range(21)]
        assert store.evict() == 0

    def test_a_get_is_a_use(self, bench: Bench, block_bytes: int) -> None:
        store = bench.open(10 * block_bytes)
        for number in range(11):
            put(store, key(number))
            bench.set_age_s(key(number), 100.0 - number)
        get(store, key(0))
        store.evict()
        assert store.contains([key(0), key(1)]) == [True, False]

    def test_an_empty_store_has_nothing_to_drop(self, bench: Bench) -> None:
        assert bench.open(1).evict() == 0


def run_together(kind: str, place: Path, *actions: str) -> list[dict[str, int]]:
    """One process for each action, all let go at once; what each of them says."""
    command = [sys.executable, "-m", "tests.store_process", kind, str(place)]
    processes = [
        subprocess.Popen([*command, action], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for action in actions
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(actions)
    return [json.loads(line) for line in said]


@pytest.mark.parametrize("kind", SHARED_BY_PROCESSES)
class TestProcesses:
    def test_two_that_put_the_same_blocks_leave_each_whole(self, kind: str, tmp_path: Path) -> None:
        bench = BENCHES[kind](tmp_path)
        store = bench.open()
        said = run_together(kind, tmp_path / "store", "put_all", "put_all")
        assert all(counts.get("stored", 0) + counts.get("exists", 0) == BLOCKS for counts in said)
        for number in range(BLOCKS):
            assert get(store, key(number), PAYLOAD_BYTES) == (BlockOutcome.HIT, payload_of(number))
        assert bench.leftovers() == []

    def test_a_reader_beside_evictors_never_gets_wrong_bytes(self, kind: str, tmp_path: Path) -> None:
        first, second, reader = run_together(kind, tmp_path / "store", "churn", "churn", "read")
        assert first["evicted"] > 0
        assert second["evicted"] > 0
        assert reader["hit"] > 0
        assert reader["missing"] > 0
        assert reader.get("corrupt", 0) == 0
        assert reader["wrong"] == 0
