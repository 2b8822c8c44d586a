"""The arena under any sequence of what its users do, with deaths, damage and repairs, against a dictionary of what was put."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kv_transfer.arena import SlotState
from kv_transfer.arena_store import ArenaStore, Staged
from kv_transfer.copies import BlockRows
from kv_transfer.store import BlockOutcome, Bytes, PutOutcome
from tests.arena_blocks import ArenaBlocks, kill
from tests.dict_store import NAMESPACE, block_hash
from tests.store_benches import SMALL_BYTES

SIZES = (9_000, 20_000, 60_000)  # of block n: SIZES[n % 3]; an arena of a megabyte has 112, 48 or 16 of them
USERS = 3
USER = st.integers(0, USERS - 1)
NUMBER = st.integers(0, 60)
COUNT = st.integers(1, 8)


def rows_of(numbers: list[int]) -> Bytes:
    """What is put under these numbers, all of one size; no two blocks have the same bytes."""
    rows = np.empty((len(numbers), SIZES[numbers[0] % len(SIZES)]), np.uint8)
    for row, number in zip(rows, numbers, strict=True):
        row[:] = np.arange(number, number + len(row), dtype=np.uint32) % 251
    return rows


def batch(first: int, count: int) -> list[int]:
    """Numbers of blocks of one size."""
    return [first + len(SIZES) * index for index in range(count)]


class ArenaMachine(RuleBasedStateMachine):
    is_native = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.users: list[ArenaStore] = []
        self.dead: list[ArenaStore] = []
        self.staged: list[tuple[int, list[int], Staged]] = []
        for _ in range(USERS):
            self.users.append(self._open())
        self.blocks = ArenaBlocks(self.folder)
        self.put_numbers: set[int] = set()  # ever put; any may be evicted, none may come back by itself
        self.dropped: set[int] = set()
        self.is_damaged = False

    def _open(self) -> ArenaStore:
        return ArenaStore(self.folder, capacity_bytes=SMALL_BYTES, native=self.is_native)

    def teardown(self) -> None:
        for user in self.users:
            user.close()
        self.blocks.close()
        shutil.rmtree(self.folder)

    def _note(self, numbers: list[int], outcomes: list[PutOutcome]) -> None:
        for number, outcome in zip(numbers, outcomes, strict=True):
            if outcome is PutOutcome.STORED:
                self.put_numbers.add(number)
                self.dropped.discard(number)

    @rule(user=USER, first=NUMBER, count=COUNT)
    def put(self, user: int, first: int, count: int) -> None:
        numbers = batch(first, count)
        held = self.users[user].contains(NAMESPACE, [block_hash(number) for number in numbers])
        outcomes = self.users[user].put(NAMESPACE, [block_hash(number) for number in numbers], rows_of(numbers))
        assert all((outcome is PutOutcome.EXISTS) == is_held for outcome, is_held in zip(outcomes, held, strict=True))
        self._note(numbers, outcomes)

    @rule(user=USER, first=NUMBER, count=COUNT)
    def get(self, user: int, first: int, count: int) -> None:
        numbers = batch(first, count)
        hashes = [block_hash(number) for number in numbers]
        rows = np.zeros((count, SIZES[first % len(SIZES)]), np.uint8)
        held = self.users[user].contains(NAMESPACE, hashes)
        outcomes = self.users[user].get_into(NAMESPACE, hashes, rows)
        for number, is_held, outcome, row, right in zip(numbers, held, outcomes, rows, rows_of(numbers), strict=True):
            assert outcome is not BlockOutcome.HIT or np.array_equal(row, right)
            assert (outcome is BlockOutcome.MISSING) == (not is_held)
            assert outcome is not BlockOutcome.CORRUPT or self.is_damaged
            assert not is_held or (number in self.put_numbers and number not in self.dropped)

    @rule(user=USER, first=NUMBER, wanted_bytes=st.sampled_from([0, 1, 64, 8_999, 16_384, 20_000]))
    def get_with_another_size(self, user: int, first: int, wanted_bytes: int) -> None:
        rows = np.zeros((1, wanted_bytes), np.uint8)
        outcome = self.users[user].get_into(NAMESPACE, [block_hash(first)], rows)[0]
        assert outcome is not BlockOutcome.HIT or wanted_bytes == SIZES[first % len(SIZES)]
        if outcome is BlockOutcome.CORRUPT:
            self.dropped.add(first)

    @rule(user=USER, size_bytes=st.sampled_from(SIZES), count=st.integers(1, 12))
    def prepare(self, user: int, size_bytes: int, count: int) -> None:
        self.users[user].prepare(size_bytes, count)

    @rule(user=USER, first=NUMBER, count=COUNT)
    def stage(self, user: int, first: int, count: int) -> None:
        numbers = batch(first, count)
        rows = rows_of(numbers)
        staged = self.users[user].stage(NAMESPACE, [block_hash(number) for number in numbers], BlockRows((rows,)), np.arange(count))
        rows[:] = 0  # the engine goes on
        self.staged.append((user, numbers[: len(staged.slots)], staged))

    @precondition(lambda self: self.staged)
    @rule(which=st.integers(0, 99))
    def commit(self, which: int) -> None:
        user, numbers, staged = self.staged.pop(which % len(self.staged))
        self._note(numbers, self.users[user].commit(staged))

    @precondition(lambda self: self.staged)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        user, _, staged = self.staged.pop(which % len(self.staged))
        self.users[user].abort(staged)

    @rule(user=USER, other=USER, first=NUMBER, count=COUNT)
    def a_leased_block_outlives_others(self, user: int, other: int, first: int, count: int) -> None:
        hashes = [block_hash(number) for number in batch(first, count)]
        leased = self.users[user].contains(NAMESPACE, hashes, lease_s=30.0)
        size_bytes = SIZES[(first + 1) % len(SIZES)]
        self.users[other].room.evict_for(self.users[other].slot_bytes(size_bytes), 50)
        self.users[other].make_room()
        assert self.users[user].contains(NAMESPACE, hashes) == leased
        self.blocks.arena.leased_until_ms[:] = 0

    @rule(user=USER, size_bytes=st.sampled_from(SIZES), count=COUNT)
    def evict(self, user: int, size_bytes: int, count: int) -> None:
        before = len(self.blocks.committed())
        self.users[user].room.evict_for(self.users[user].slot_bytes(size_bytes), count)
        assert len(self.blocks.committed()) <= before

    @rule(user=USER)
    def make_room(self, user: int) -> None:
        before = self.users[user].stats().blocks
        assert self.users[user].make_room() >= before - self.users[user].stats().blocks

    @rule(user=USER, first=NUMBER, count=COUNT)
    def drop(self, user: int, first: int, count: int) -> None:
        numbers = batch(first, count)
        hashes = [block_hash(number) for number in numbers]
        held = sum(self.users[user].contains(NAMESPACE, hashes))
        assert self.users[user].drop(NAMESPACE, hashes) == held
        self.dropped.update(numbers)

    @precondition(lambda self: self.blocks.committed())
    @rule(which=st.integers(0, 10_000), where=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
    def damage_payload(self, which: int, where: float, bits: int) -> None:
        held = self.blocks.held()
        wanted = held[which % len(held)]
        self.blocks.flip(wanted, int(where * len(self.blocks.payload(wanted))), bits)
        self.is_damaged = True

    @precondition(lambda self: self.blocks.committed())
    @rule(user=USER, which=st.integers(0, 10_000), position=st.integers(0, 95), bits=st.integers(1, 255))
    def damage_record_and_repair(self, user: int, which: int, position: int, bits: int) -> None:
        slots = self.blocks.committed()
        slot = slots[which % len(slots)]
        before = self.blocks.record(slot).copy()
        self.blocks.record(slot)[position] ^= bits
        self.users[user].upkeep.repair()
        assert slot not in self.blocks.committed() or not (self.blocks.record(slot)[:80] != before[:80]).any()

    @rule(user=USER, share=st.sampled_from([0.1, 1.0]))
    def lose_cells_and_repair(self, user: int, share: float) -> None:
        before = set(self.blocks.held())
        cells = self.blocks.arena.cells.reshape(-1)
        cells[: int(share * len(cells))] = 0
        assert self.users[user].upkeep.repair() == 0
        assert set(self.blocks.held()) == before

    @rule(user=USER)
    def repair(self, user: int) -> None:
        before = self.blocks.held()
        assert self.users[user].upkeep.repair() == 0
        assert self.blocks.held() == before

    @rule(user=USER)
    def restart(self, user: int) -> None:
        """It ends in good order and comes back."""
        before = self.blocks.held()
        self.staged = [one for one in self.staged if one[0] != user]  # what is staged at the end is lost
        granted = len(self.blocks.granted())
        self.users[user].close()
        assert self.blocks.held() == before
        assert len(self.blocks.granted()) <= granted
        self.users[user] = self._open()

    @rule(user=USER, size_bytes=st.sampled_from(SIZES), takes_number=st.booleans())
    def die(self, user: int, size_bytes: int, takes_number: bool) -> None:
        """It is killed: its descriptors are closed, and nothing else is done. Then it is started again, and may take its own number."""
        before = self.blocks.held()
        kill(self.users[user])
        self.staged = [one for one in self.staged if one[0] != user]
        self.users[user] = self._open()
        if takes_number:
            self.users[user].prepare(size_bytes, 1)
        else:
            assert self.blocks.held() == before
        self.users[(user + 1) % USERS].upkeep.reclaim()

    def _is_alive(self, number: int) -> bool:
        return any(user._writers._descriptor is not None and user._writers._number == number for user in self.users)

    @invariant()
    def every_slot_is_in_order(self) -> None:
        for user in self.users[:1]:
            user.upkeep.reclaim()
        assert self.blocks.faults(self._is_alive) == []

    @invariant()
    def no_slot_is_lost(self) -> None:
        owned = {slot for user in self.users for slots in user._grants.values() for slot in slots.tolist()}
        staged = {slot for _, _, staged in self.staged for slot in staged.slots.tolist()}
        assert owned | staged == set(self.blocks.granted())
        assert not owned & staged
        assert len(self.blocks.free()) + len(self.blocks.granted()) + len(self.blocks.committed()) == len(self.blocks.real_slots())
        assert (self.blocks.arena.state <= SlotState.COMMITTED).all()

    @invariant()
    def blocks_are_those_that_were_put(self) -> None:
        held = {found.block_hash for found in self.blocks.held()}
        assert held <= {block_hash(number) for number in self.put_numbers - self.dropped}
        assert self.users[0].stats().blocks == len(held)


class NumpyArenaMachine(ArenaMachine):
    is_native = False


@pytest.mark.parametrize("machine", [ArenaMachine, NumpyArenaMachine])
def test_no_sequence_of_events_mixes_blocks_up_or_loses_a_slot(machine: type[ArenaMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=150, stateful_step_count=50, deadline=None))
