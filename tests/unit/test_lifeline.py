"""What the end of a lifeline does. A pipe stands for the socket."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from tandem.lifeline import stop_at_end


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)


async def test_the_end_of_the_lifeline_stops_and_is_noticed_once(pipe: tuple[int, int]) -> None:
    stop = asyncio.Event()
    stop_at_end(pipe[0], stop)
    os.close(pipe[1])
    await stop.wait()
    assert not asyncio.get_running_loop().remove_reader(pipe[0])


async def test_bytes_on_the_lifeline_do_not_stop(pipe: tuple[int, int]) -> None:
    stop = asyncio.Event()
    stop_at_end(pipe[0], stop)
    os.write(pipe[1], b"still here\n")
    for _ in range(3):
        await asyncio.sleep(0)
    assert not stop.is_set()
    os.close(pipe[1])
    await stop.wait()


async def test_a_wake_up_for_nothing_does_not_stop(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[0], False)
    stop = asyncio.Event()
    stop_at_end(pipe[0], stop)
    os.write(pipe[1], b"x")
    os.read(pipe[0], 1)  # somebody else was first
    for _ in range(3):
        await asyncio.sleep(0)
    assert not stop.is_set()
    os.close(pipe[1])
    await stop.wait()
