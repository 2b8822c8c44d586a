"""What every block store keeps to. A new store adds a bench to BENCHES, and a kind to tests/store_process.py where processes share it."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kv_transfer.blocks import BlockKey
from kv_transfer.store import BlockOutcome, BlockStore, PutOutcome
from tandem.domain import Namespace
from tests.dict_store import NAMESPACE, block_hash, key
from tests.layers import ROOT
from tests.store_benches import BENCHES, OTHER, PAYLOAD, SHARED_BY_PROCESSES, SMALL_BYTES, A, B, Bench, as_rows, get, held, put
from tests.store_process import BLOCKS, PAYLOAD_BYTES, payload_of

SIZES = (0, 1, 63, 64, 240, 241, 256, 320, 777, 4096, 65_536)


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    made = BENCHES[request.param](tmp_path)
    yield made
    made.close()


def random_payload(payload_bytes: int) -> bytes:
    return np.random.default_rng(payload_bytes).bytes(payload_bytes)


class TestPutAndGet:
    def test_what_was_put_is_got(self, bench: Bench) -> None:
        assert put(bench.open(), A) is PutOutcome.STORED
        assert get(bench.open(), A) == (BlockOutcome.HIT, PAYLOAD)

    @pytest.mark.parametrize("payload_bytes", SIZES)
    def test_blocks_of_any_size_are_blocks(self, bench: Bench, payload_bytes: int) -> None:
        store, payload = bench.open(), random_payload(payload_bytes)
        assert put(store, A, payload) is PutOutcome.STORED
        assert get(bench.open(), A, payload_bytes) == (BlockOutcome.HIT, payload)
        assert store.payload_bytes(NAMESPACE, A.block_hash) == payload_bytes

    def test_blocks_of_several_sizes_live_side_by_side(self, bench: Bench) -> None:
        store = bench.open()
        for number, payload_bytes in enumerate(SIZES):
            assert put(store, key(number), random_payload(payload_bytes)) is PutOutcome.STORED
        for number, payload_bytes in enumerate(SIZES):
            assert get(store, key(number), payload_bytes) == (BlockOutcome.HIT, random_payload(payload_bytes))

    def test_blocks_of_several_namespaces_are_kept_apart(self, bench: Bench) -> None:
        store = bench.open()
        elsewhere = BlockKey(Namespace("ff" * 16), A.block_hash)
        put(store, A)
        assert get(store, elsewhere)[0] is BlockOutcome.MISSING
        put(store, elsewhere, OTHER)
        assert get(store, A)[1] == PAYLOAD
        assert get(store, elsewhere)[1] == OTHER
        assert store.drop(elsewhere.namespace, [A.block_hash]) == 1
        assert get(store, A)[1] == PAYLOAD

    def test_a_missing_block_is_a_value(self, bench: Bench) -> None:
        store = bench.open()
        put(store, B)
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert held(store, [A, B, A]) == [False, True, False]
        assert store.payload_bytes(NAMESPACE, A.block_hash) is None

    def test_a_second_put_finds_the_block(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A)
        assert put(bench.open(), A, OTHER) is PutOutcome.EXISTS
        assert get(store, A)[1] == PAYLOAD

    def test_a_batch_answers_for_each_block_in_order(self, bench: Bench) -> None:
        store = bench.open()
        put(store, B, OTHER)
        a, b, c, missing = (block_hash(number) for number in (1, 2, 3, 4))
        rows = as_rows(PAYLOAD, PAYLOAD, OTHER)
        assert store.put(NAMESPACE, [a, b, c], rows) == [PutOutcome.STORED, PutOutcome.EXISTS, PutOutcome.STORED]
        got = np.zeros((4, len(PAYLOAD)), np.uint8)
        assert store.get_into(NAMESPACE, [c, missing, b, a], got) == [
            BlockOutcome.HIT,
            BlockOutcome.MISSING,
            BlockOutcome.HIT,
            BlockOutcome.HIT,
        ]
        assert [row.tobytes() for row in got[[0, 2, 3]]] == [OTHER, OTHER, PAYLOAD]

    def test_a_block_named_twice_in_a_batch_is_stored_once(self, bench: Bench) -> None:
        store = bench.open()
        outcomes = store.put(NAMESPACE, [A.block_hash] * 2, as_rows(PAYLOAD, OTHER))
        assert outcomes == [PutOutcome.STORED, PutOutcome.EXISTS]
        assert get(store, A)[1] == PAYLOAD
        assert store.stats().blocks == 1

    def test_empty_batches_are_fine(self, bench: Bench) -> None:
        store = bench.open()
        none = np.zeros((0, 10), np.uint8)
        assert (store.contains(NAMESPACE, []), store.put(NAMESPACE, [], none), store.get_into(NAMESPACE, [], none)) == ([], [], [])
        assert store.drop(NAMESPACE, []) == 0

    def test_rows_may_lie_apart_in_memory(self, bench: Bench) -> None:
        store = bench.open()
        wide = np.zeros((4, 3 * len(PAYLOAD)), np.uint8)
        wide[::2, : len(PAYLOAD)] = as_rows(PAYLOAD, OTHER)
        store.put(NAMESPACE, [A.block_hash, B.block_hash], wide[::2, : len(PAYLOAD)])
        into = np.zeros_like(wide)
        store.get_into(NAMESPACE, [A.block_hash, B.block_hash], into[::2, : len(PAYLOAD)])
        assert np.array_equal(into, wide)

    def test_stats_count_the_visible_blocks(self, bench: Bench) -> None:
        store = bench.open()
        assert (store.stats().blocks, store.stats().used_bytes) == (0, 0)
        put(store, A)
        put(store, B)
        stats = store.stats()
        assert stats.blocks == 2
        assert 2 * len(PAYLOAD) <= stats.used_bytes < 3 * len(PAYLOAD)
        assert stats.capacity_bytes >= stats.used_bytes

    def test_blocks_outlive_the_user_that_put_them(self, bench: Bench) -> None:
        store, other = bench.open(), bench.open()
        put(store, A)
        store.close()
        assert get(other, A) == (BlockOutcome.HIT, PAYLOAD)


class TestDrop:
    def test_a_dropped_block_is_missing_and_can_be_put_again(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A)
        put(store, B)
        assert store.drop(NAMESPACE, [A.block_hash, key(3).block_hash]) == 1
        assert get(store, A)[0] is BlockOutcome.MISSING
        assert store.drop(NAMESPACE, [A.block_hash]) == 0
        assert held(store, [A, B]) == [False, True]
        assert put(store, A, OTHER) is PutOutcome.STORED
        assert get(store, A) == (BlockOutcome.HIT, OTHER)

    def test_a_leased_block_can_be_dropped(self, bench: Bench) -> None:
        store = bench.open()
        put(store, A)
        store.contains(NAMESPACE, [A.block_hash], lease_s=60.0)
        assert store.drop(NAMESPACE, [A.block_hash]) == 1
        assert held(store, [A]) == [False]


class TestDamage:
    @pytest.mark.parametrize("payload_bytes", [32, 256, 320])
    def test_a_changed_byte_anywhere_is_corrupt_and_then_missing(self, bench: Bench, payload_bytes: int) -> None:
        store = bench.open()
        for position in range(payload_bytes):
            assert put(store, A, PAYLOAD[:payload_bytes]) is PutOutcome.STORED
            bench.damage(A, position)
            assert get(store, A, payload_bytes)[0] is BlockOutcome.CORRUPT, position
            assert get(store, A, payload_bytes)[0] is BlockOutcome.MISSING
            assert held(store, [A]) == [False]

    def test_a_changed_byte_of_the_record_is_never_a_hit_with_other_bytes(self, bench: Bench) -> None:
        store = bench.open()
        for position in range(bench.record_bytes):
            damaged = key(position)
            put(store, damaged)
            bench.damage_record(damaged, position)
            outcome, payload = get(store, damaged)
            assert outcome is not BlockOutcome.HIT or payload == PAYLOAD
            assert put(store, damaged) is (PutOutcome.EXISTS if outcome is BlockOutcome.HIT else PutOutcome.STORED)
            assert get(store, damaged) == (BlockOutcome.HIT, PAYLOAD)

    @pytest.mark.parametrize("wanted_bytes", [0, 1, 960, len(PAYLOAD) - 1, len(PAYLOAD) + 1, 4096, 65_536])
    def test_a_block_of_another_size_than_the_row_is_a_miss_and_stays(self, bench: Bench, wanted_bytes: int) -> None:
        store = bench.open()
        put(store, A)
        assert get(store, A, wanted_bytes)[0] is BlockOutcome.MISSING
        assert get(store, A) == (BlockOutcome.HIT, PAYLOAD)

    def test_damage_to_one_block_leaves_the_others(self, bench: Bench) -> None:
        store = bench.open()
        hashes = [block_hash(number) for number in range(8)]
        store.put(NAMESPACE, hashes, as_rows(*[PAYLOAD] * 8))
        bench.damage(key(3), 1000)
        rows = np.zeros((8, len(PAYLOAD)), np.uint8)
        outcomes = store.get_into(NAMESPACE, hashes, rows)
        assert outcomes == [BlockOutcome.CORRUPT if number == 3 else BlockOutcome.HIT for number in range(8)]
        assert all(row.tobytes() == PAYLOAD for number, row in enumerate(rows) if number != 3)


def overfill(store: BlockStore, bench: Bench) -> int:
    """Puts blocks 0, 1, ..., each older than the next, until some block has to go for one; how many were put."""
    for number in itertools.count():
        before = store.stats().blocks
        assert put(store, key(number)) is PutOutcome.STORED
        bench.set_age_s(key(number), 10_000.0 - number)
        if store.stats().blocks <= before:
            return number + 1
    raise AssertionError


class TestEviction:
    def test_nothing_goes_within_the_capacity(self, bench: Bench) -> None:
        store = bench.open(SMALL_BYTES)
        for number in range(SMALL_BYTES * 3 // 4 // len(PAYLOAD)):
            assert put(store, key(number)) is PutOutcome.STORED
        assert store.make_room() == 0
        assert store.stats().blocks == SMALL_BYTES * 3 // 4 // len(PAYLOAD)

    def test_a_put_beyond_the_capacity_takes_the_place_of_the_least_recently_used(self, bench: Bench) -> None:
        store = bench.open(SMALL_BYTES)
        blocks = overfill(store, bench)
        flags = held(store, [key(number) for number in range(blocks)])
        evicted = flags.index(True)
        assert 0 < evicted < blocks // 4
        assert all(flags[evicted:])
        assert store.stats().used_bytes <= store.stats().capacity_bytes

    def test_a_get_is_a_use(self, bench: Bench) -> None:
        store, used = bench.open(SMALL_BYTES), key(1_000_000)
        put(store, used)
        bench.set_age_s(used, 20_000.0)
        assert get(store, used)[0] is BlockOutcome.HIT
        overfill(store, bench)
        assert held(store, [used, key(0)]) == [True, False]

    def test_a_leased_block_stays_for_as_long_as_its_lease(self, bench: Bench) -> None:
        store = bench.open(SMALL_BYTES)
        leased = [block_hash(1_000_000), block_hash(1_000_001)]
        store.put(NAMESPACE, leased, as_rows(PAYLOAD, PAYLOAD))
        for number in (1_000_000, 1_000_001):
            bench.set_age_s(key(number), 20_000.0)
        assert bench.open().contains(NAMESPACE, [*leased, B.block_hash], lease_s=60.0) == [True, True, False]
        blocks = overfill(store, bench)
        assert store.contains(NAMESPACE, leased) == [True, True]
        for number in (1_000_000, 1_000_001):
            bench.end_lease(key(number))
        for number in range(blocks, 2 * blocks):
            put(store, key(number))
        assert store.contains(NAMESPACE, leased) == [False, False]

    def test_a_store_full_of_leased_blocks_has_no_room(self, bench: Bench) -> None:
        store = bench.open(SMALL_BYTES)
        blocks = overfill(store, bench)
        everything = [block_hash(number) for number in range(blocks)]
        for number in itertools.count(blocks):
            store.contains(NAMESPACE, everything, lease_s=60.0)
            if put(store, key(number)) is PutOutcome.NO_ROOM:
                break
            everything.append(block_hash(number))
        before = store.contains(NAMESPACE, everything)
        assert put(store, key(2_000_000)) is PutOutcome.NO_ROOM
        assert store.contains(NAMESPACE, everything) == before
        assert store.make_room() == 0

    def test_room_is_made_ahead_of_need(self, bench: Bench) -> None:
        store = bench.open(SMALL_BYTES)
        blocks = overfill(store, bench)
        while store.stats().used_bytes + 2 * len(PAYLOAD) <= SMALL_BYTES:
            assert put(store, key(blocks)) is PutOutcome.STORED
            blocks += 1
        before = store.stats().blocks
        evicted = store.make_room()
        assert 0 < evicted == before - store.stats().blocks
        assert store.make_room() == 0

    def test_an_empty_store_has_nothing_to_evict(self, bench: Bench) -> None:
        assert bench.open(SMALL_BYTES).make_room() == 0


class TestNoRoom:
    def test_a_put_without_room_leaves_nothing(self, bench: Bench) -> None:
        store = bench.full()
        assert put(store, A) is PutOutcome.NO_ROOM
        assert held(store, [A]) == [False]
        assert store.stats().blocks == 0

    def test_a_block_that_no_store_of_this_capacity_can_hold_has_no_room(self, bench: Bench) -> None:
        store = bench.open(SMALL_BYTES)
        put(store, A)
        assert put(store, B, bytes(SMALL_BYTES + 1)) is PutOutcome.NO_ROOM
        assert get(store, B, SMALL_BYTES + 1)[0] is BlockOutcome.MISSING
        assert get(store, A)[0] is BlockOutcome.HIT

    def test_a_batch_beyond_the_capacity_is_answered_block_by_block(self, bench: Bench) -> None:
        store = bench.open(SMALL_BYTES)
        count = 2 * SMALL_BYTES // len(PAYLOAD)
        outcomes = store.put(NAMESPACE, [block_hash(number) for number in range(count)], np.zeros((count, len(PAYLOAD)), np.uint8))
        assert len(outcomes) == count
        assert set(outcomes) <= {PutOutcome.STORED, PutOutcome.NO_ROOM}
        assert outcomes[0] is PutOutcome.STORED
        assert store.stats().blocks > 0


class TestThreads:
    def test_threads_that_put_different_blocks_store_them_all(self, bench: Bench) -> None:
        store = bench.open()

        def put_some(first: int) -> list[PutOutcome]:
            return [put(store, key(number), random_payload(1000 + number)[:1024]) for number in range(first, first + 100)]

        with ThreadPoolExecutor(4) as pool:
            outcomes = [outcome for some in pool.map(put_some, range(0, 400, 100)) for outcome in some]
        assert outcomes == [PutOutcome.STORED] * 400

    def test_readers_beside_writers_never_get_wrong_bytes(self, bench: Bench) -> None:
        store = bench.open(SMALL_BYTES)
        payloads = [random_payload(9_000 + number)[:8_192] for number in range(300)]  # more than there is room for

        def put_some(first: int) -> int:
            return sum(put(store, key(number), payloads[number]) is PutOutcome.STORED for number in range(first, 300, 2))

        def get_some(first: int) -> int:
            hits = 0
            for number in [*range(first, 300), *range(first)] * 3:
                outcome, payload = get(store, key(number), 8_192)
                assert outcome is not BlockOutcome.CORRUPT
                assert outcome is BlockOutcome.MISSING or payload == payloads[number]
                hits += outcome is BlockOutcome.HIT
            return hits

        with ThreadPoolExecutor(4) as pool:
            writers, readers = pool.map(put_some, range(2)), pool.map(get_some, (0, 150))
            assert sum(writers) > 0
            list(readers)
        assert get_some(0) > 0


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
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(actions)
    return [json.loads(line) for line in said]


@pytest.mark.parametrize("kind", SHARED_BY_PROCESSES)
class TestProcesses:
    def test_two_that_put_the_same_blocks_leave_each_whole(self, kind: str, tmp_path: Path) -> None:
        bench = BENCHES[kind](tmp_path)
        store = bench.open()  # with room for all
        said = run_together(kind, tmp_path / "store", "put_all", "put_all")
        assert [counts.get("stored", 0) + counts.get("exists", 0) for counts in said] == [BLOCKS, BLOCKS], said
        assert sum(counts.get("stored", 0) for counts in said) == BLOCKS
        for number in range(BLOCKS):
            assert get(store, key(number), PAYLOAD_BYTES) == (BlockOutcome.HIT, payload_of(number))
        assert bench.leftovers() == 0
        bench.close()

    def test_a_reader_beside_evictors_never_gets_wrong_bytes(self, kind: str, tmp_path: Path) -> None:
        first, second, reader = run_together(kind, tmp_path / "store", "churn", "churn", "read")
        for counts in (first, second):
            assert counts["stored"] > BLOCKS  # each had room made for it, many times
        assert reader["hit"] > 0
        assert reader["missing"] > 0
        assert reader.get("corrupt", 0) == 0
        assert reader["wrong"] == 0
        bench = BENCHES[kind](tmp_path)
        assert bench.open().stats().blocks > 0
        assert bench.leftovers() == 0
        bench.close()
