"""The arena's lock: who waits for it, and how long."""

import fcntl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kv_transfer.arena_lock import FILE_NAME, ArenaLock

NEVER_S = 3600.0


@pytest.fixture
def open_lock(tmp_path: Path) -> Iterator[Callable[[], ArenaLock]]:
    """Opens it as one more process would."""
    locks: list[ArenaLock] = []

    def open_one() -> ArenaLock:
        locks.append(ArenaLock(tmp_path))
        return locks[-1]

    yield open_one
    for lock in locks:
        lock.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_holder_that_is_stopped_costs_the_time_out_whatever_the_patience(
    open_lock: Callable[[], ArenaLock], tmp_path: Path, threads: int
) -> None:
    lock = open_lock()
    outcomes: list[bool] = []
    with (tmp_path / FILE_NAME).open() as of_another:
        fcntl.flock(of_another, fcntl.LOCK_EX)
        waiting = [threading.Thread(target=lambda: outcomes.append(lock.acquire(0.05, NEVER_S)), daemon=True) for _ in range(threads)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join(60.0)
        assert outcomes == [False] * threads
    assert lock.acquire(1.0)
    lock.release()


@pytest.mark.parametrize(("patience_s", "is_had"), [(NEVER_S, True), (0.0, False)])
def test_a_busy_lock_is_waited_for_while_others_take_turns(open_lock: Callable[[], ArenaLock], patience_s: float, *, is_had: bool) -> None:
    busy, lock = open_lock(), open_lock()
    assert busy.acquire(1.0)
    end, turns = threading.Event(), 0

    def take_turns() -> None:
        nonlocal turns
        while not end.is_set() and turns < 40:
            busy._turns[0] += 1  # another process has had it and given it to the next one
            turns += 1
            end.wait(0.02)
        busy.release()

    thread = threading.Thread(target=take_turns)
    thread.start()
    assert lock.acquire(0.4, patience_s) == is_had
    assert not is_had or turns == 40  # 0.8 s, twice the time-out
    end.set()
    thread.join(60.0)
    if is_had:
        lock.release()


def test_a_file_that_others_have_open_keeps_its_turns(open_lock: Callable[[], ArenaLock]) -> None:
    first = open_lock()
    assert first.acquire(1.0)
    first.release()
    second = open_lock()
    assert second.acquire(1.0)
    second.release()
    assert first._turns[0] == second._turns[0] == 2
