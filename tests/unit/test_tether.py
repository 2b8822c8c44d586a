"""When a watcher believes that the owner is gone. The lock across processes is in tests/integration/test_tether.py."""

import os
from pathlib import Path

import pytest

from tandem.tether import Tether, hold, is_held


class Clock:
    def __init__(self) -> None:
        self.now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.lock"


def let_go(descriptor: int | None) -> None:
    assert descriptor is not None
    os.close(descriptor)


def test_a_tether_is_cut_once_nobody_has_held_it_for_the_grace_time(path: Path) -> None:
    clock = Clock()
    tether = Tether(path, grace_s=5.0, clock=clock)
    held = hold(path)
    clock.now_s += 100.0
    assert not tether.is_cut()
    let_go(held)
    clock.now_s += 5.0
    assert not tether.is_cut()
    clock.now_s += 0.1
    assert tether.is_cut()


def test_a_successor_within_the_grace_time_keeps_it(path: Path) -> None:
    clock = Clock()
    tether = Tether(path, grace_s=5.0, clock=clock)
    let_go(hold(path))
    clock.now_s += 4.0
    assert not tether.is_cut()
    held = hold(path)
    clock.now_s += 4.0
    assert not tether.is_cut()
    let_go(held)


def test_a_tether_that_nobody_ever_held_is_cut_after_the_grace_time_too(path: Path) -> None:
    clock = Clock()
    tether = Tether(path, grace_s=5.0, clock=clock)
    assert not tether.is_cut()
    clock.now_s += 5.1
    assert tether.is_cut()


def test_looking_does_not_take_it(path: Path) -> None:
    assert not is_held(path)
    assert not path.exists()
    let_go(hold(path))
    assert not is_held(path)
    let_go(hold(path))


def test_the_lock_is_of_this_user_alone(path: Path) -> None:
    let_go(hold(path))
    assert path.stat().st_mode & 0o777 == 0o600
