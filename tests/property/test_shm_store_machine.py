"""The store in shared memory against a store in a dictionary, under any sequence of operations and damage."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kv_transfer.blocks import BlockKey
from kv_transfer.shm_store import FileReservation, ShmStore
from tests.dict_store import DictReservation, DictStore, key

NUMBERS = st.integers(0, 4)
PAYLOADS = st.sampled_from([b"", b"a" * 10, b"b" * 10, b"c" * 100])
ROOMY_BYTES = 1 << 30


class ShmStoreMachine(RuleBasedStateMachine):
    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        # Two users of one folder, as two processes are.
        self.stores = [ShmStore(self.folder, capacity_bytes=ROOMY_BYTES) for _ in range(2)]
        self.model = DictStore()
        self.open_reservations: list[FileReservation] = []

    def teardown(self) -> None:
        for reservation in self.open_reservations:
            reservation.abort()
        for store in self.stores:
            store.close()
        shutil.rmtree(self.folder)

    def _path(self, wanted: BlockKey) -> Path:
        return self.folder / wanted.namespace / wanted.block_hash.hex()

    @rule(user=st.integers(0, 1), blocks=st.lists(st.tuples(NUMBERS, PAYLOADS), max_size=4))
    def put(self, user: int, blocks: list[tuple[int, bytes]]) -> None:
        keys = [key(number) for number, _ in blocks]
        payloads = [memoryview(payload) for _, payload in blocks]
        assert self.stores[user].put(keys, payloads) == self.model.put(keys, payloads)

    @rule(user=st.integers(0, 1), blocks=st.lists(st.tuples(NUMBERS, PAYLOADS), max_size=4))
    def get(self, user: int, blocks: list[tuple[int, bytes]]) -> None:
        keys = [key(number) for number, _ in blocks]
        ours, theirs = [[bytearray(len(payload)) for _, payload in blocks] for _ in range(2)]
        outcomes = self.stores[user].get_into(keys, [memoryview(buffer) for buffer in ours])
        assert outcomes == self.model.get_into(keys, [memoryview(buffer) for buffer in theirs])
        for outcome, got, expected in zip(outcomes, ours, theirs, strict=True):
            assert outcome != "hit" or got == expected

    @rule(target=reservations, user=st.integers(0, 1), number=NUMBERS, payload=PAYLOADS)
    def reserve(self, user: int, number: int, payload: bytes) -> tuple[FileReservation, DictReservation]:
        ours, theirs = self.stores[user].try_reserve(key(number), len(payload)), self.model.try_reserve(key(number), len(payload))
        assert ours is not None
        assert theirs is not None
        ours.write(memoryview(payload))
        theirs.write(memoryview(payload))
        self.open_reservations.append(ours)
        return ours, theirs

    @rule(pair=consumes(reservations))
    def commit(self, pair: tuple[FileReservation, DictReservation]) -> None:
        for reservation in pair:
            reservation.commit()
        self.open_reservations.remove(pair[0])

    @rule(pair=consumes(reservations))
    def abort(self, pair: tuple[FileReservation, DictReservation]) -> None:
        for reservation in pair:
            reservation.abort()
        self.open_reservations.remove(pair[0])

    @rule(user=st.integers(0, 1), number=NUMBERS)
    def quarantine(self, user: int, number: int) -> None:
        self.stores[user].quarantine(key(number))
        self.model.quarantine(key(number))

    @rule(number=NUMBERS, damage=st.sampled_from(["flip", "cut", "grow"]), where=st.floats(0, 1, exclude_max=True))
    def damage(self, number: int, damage: str, where: float) -> None:
        damaged = key(number)
        if damaged not in self.model.blocks:
            return
        stored = bytearray(self.model.blocks[damaged])
        position = int(where * len(stored))
        match damage:
            case "flip" if stored:
                stored[position] ^= 1
            case "cut":
                del stored[position:]
            case _:
                stored += b"x"
        self.model.blocks[damaged] = bytes(stored)
        self._path(damaged).write_bytes(stored)

    @rule(user=st.integers(0, 1))
    def evict(self, user: int) -> None:
        assert self.stores[user].evict() == 0

    @invariant()
    def agree(self) -> None:
        everything = [key(number) for number in range(5)]
        for store in self.stores:
            assert store.contains(everything) == self.model.contains(everything)
            stats, expected = store.stats(), self.model.stats()
            assert (stats.blocks, stats.used_bytes) == (expected.blocks, expected.used_bytes)

    @rule(user=st.integers(0, 1), payload_bytes=st.integers(1, 64))
    def add_spare(self, user: int, payload_bytes: int) -> None:
        self.stores[user].add_spare(payload_bytes)

    @invariant()
    def unfinished_files_have_no_name(self) -> None:
        assert sum(path.is_file() for path in self.folder.rglob("*")) == len(self.model.blocks)


TestShmStoreMachine = ShmStoreMachine.TestCase
TestShmStoreMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
