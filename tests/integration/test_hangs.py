"""Stopped processes, by real signals: what is kept is killed and started again, an engine's is told."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from tandem.engine_watch import EngineJudge, EnginePulse
from tandem.hang import is_stopped, killed_if_stopped, try_look
from tandem.keeper import Keeper
from tandem.polling import poll_until

pytestmark = pytest.mark.integration

WAIT_S = 30.0


@pytest.fixture
async def sleeper() -> AsyncIterator[asyncio.subprocess.Process]:
    process = await start()
    yield process
    if process.returncode is None:
        process.kill()
        await process.wait()


async def start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec("sleep", "600")


async def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    await poll_until(lambda: is_stopped(pid), 0.01)


async def test_a_stopped_process_is_seen(sleeper: asyncio.subprocess.Process) -> None:
    assert not is_stopped(sleeper.pid)
    await stop(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGCONT)
    async with asyncio.timeout(WAIT_S):
        await poll_until(lambda: not is_stopped(sleeper.pid), 0.01)


async def test_a_process_that_is_gone_is_not_stopped(sleeper: asyncio.subprocess.Process) -> None:
    sleeper.kill()
    await sleeper.wait()
    assert try_look(sleeper.pid) is None
    async with killed_if_stopped(sleeper.pid, 0.01):
        await asyncio.sleep(0.05)


async def test_a_stopped_process_is_killed_in_the_context_only(sleeper: asyncio.subprocess.Process) -> None:
    async with killed_if_stopped(sleeper.pid, 0.01):
        await asyncio.sleep(0.05)
    await stop(sleeper.pid)
    await asyncio.sleep(0.1)
    assert sleeper.returncode is None
    async with killed_if_stopped(sleeper.pid, 0.01), asyncio.timeout(WAIT_S):
        assert await sleeper.wait() == -signal.SIGKILL


@pytest.mark.parametrize("may_stop", [False, True])
async def test_a_kept_child_that_is_stopped_is_started_again_unless_it_may_be(may_stop: bool) -> None:
    restarted = asyncio.Event()
    keeper = Keeper(lambda _: None, lambda _: restarted.set())
    await keeper.keep("child", start, may_stop=may_stop)
    first = keeper.children["child"].process
    await stop(first.pid)
    try:
        if may_stop:
            await asyncio.sleep(4.0)
            assert first.returncode is None
        else:
            async with asyncio.timeout(WAIT_S):
                await restarted.wait()
            assert first.returncode == -signal.SIGKILL
    finally:
        await keeper.release()
        os.kill(keeper.children["child"].process.pid, signal.SIGKILL)
        await keeper.children["child"].process.wait()


async def test_an_engine_whose_process_is_stopped_hangs_at_the_second_look(sleeper: asyncio.subprocess.Process) -> None:
    judge = EngineJudge(60.0, os.sysconf("SC_CLK_TCK"))
    await stop(sleeper.pid)
    busy = EnginePulse(pids=(sleeper.pid,), is_busy=True, steps=1)
    assert [judge.judge(busy), judge.judge(busy)] == ["", "was stopped by a signal"]


async def test_an_engine_that_computes_has_ten_times_as_long() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
    judge = EngineJudge(2.0, os.sysconf("SC_CLK_TCK"))
    words = []
    try:
        for number in range(4):
            await poll_until(lambda number=number: used_ticks(process.pid) > 20 * number, 0.02)  # type: ignore[misc]
            words.append(judge.judge(EnginePulse(pids=(process.pid,), is_busy=True, steps=1)))
    finally:
        process.kill()
        await process.wait()
    assert words == [""] * 4


def used_ticks(pid: int) -> int:
    look = try_look(pid)
    assert look is not None
    return look.cpu_ticks
