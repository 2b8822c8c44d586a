"""Supervisors that die, hang and come back; replicas that hang, drain and are left alone: processes with an engine of a few lines."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path

import pytest

from tandem import adoption
from tandem.channel_pool import ChannelPool
from tandem.convert import request_to_worker_pb
from tandem.custody import claim_file
from tandem.domain import Plan, PlannedWorker, ReplicaId, Sampling
from tandem.errors import UnavailableError
from tandem.rpc import open_stream
from tandem.supervisor import SupervisedState, SupervisorReport
from tandem.tether import hold, is_held
from tandem.zygote_client import zygote_environment
from tests.integration.supervised_node import WAIT_S, ZYGOTE, Node, eventually, lives, until
from tests.layers import ROOT
from tests.samples import make_request
from tests.worker_cluster import PROMPT_TOKENS, read

pytestmark = pytest.mark.integration


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)
    tether = hold(made.tether)
    assert tether is not None
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ZYGOTE, str(made.socket), str(made.tether)),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=zygote_environment(),
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"zygote ready\n"
    yield made
    await eventually(lambda: not is_held(claim_file(made.config)), 10.0)  # no replica is left
    process.kill()
    await process.wait()
    os.close(tether)


Asked = Callable[[SupervisorReport, int], Coroutine[None, None, list[int]]]


@pytest.fixture
async def ask() -> AsyncIterator[Asked]:
    """Asks a replica for so many tokens; returns them."""
    channels = ChannelPool()

    async def run(report: SupervisorReport, max_tokens: int) -> list[int]:
        planned = PlannedWorker(replica_id=ReplicaId(report.replica_id), incarnation=report.incarnation, address=report.address)
        plan = Plan(plan_id="p", decode=planned, one_worker_reason="test")
        request = make_request("r", PROMPT_TOKENS, Sampling(max_tokens=max_tokens))
        message = request_to_worker_pb(request, plan, 1, report.incarnation)
        tokens: list[int] = []
        async with open_stream(channels(planned.address), "tandem.v1.Worker/Generate", message, timeout_s=WAIT_S) as stream:
            while (chunk := await read(stream)) is not None:
                tokens += chunk.token_ids
        return tokens

    yield run
    await channels.close()


async def test_a_replica_outlives_its_supervisor_and_is_adopted_by_the_next(node: Node, ask: Asked) -> None:
    async with node.other_process() as first:
        before = await first.report()
        running = asyncio.create_task(ask(before, 30))
        await asyncio.sleep(0.2)
        await first.kill()
        assert await ask(before, 2) == [6, 7]  # a new request of an orphan
        assert await running == list(range(6, 36))
    async with node.supervised() as (supervisor, after):
        assert (after.pid, after.incarnation, after.address, after.restarts) == (before.pid, before.incarnation, before.address, 0)
        assert await ask(after, 2) == [6, 7]
        os.kill(after.pid, signal.SIGKILL)  # it is supervised like one of its own
        again = await until(supervisor, SupervisedState.RUNNING, after.version)
        assert again.incarnation > after.incarnation
        assert again.address == after.address
    assert not lives(again.pid)


async def test_a_replica_goes_from_hand_to_hand(node: Node) -> None:
    pids = set()
    for _ in range(3):
        async with node.other_process() as supervisor:
            pids.add((await supervisor.report()).pid)
            await supervisor.kill()
    async with node.supervised() as (_, report):
        pids.add(report.pid)
    assert len(pids) == 1


async def test_a_supervisor_that_stops_on_purpose_ends_its_replica_at_once(node: Node) -> None:
    async with node.supervised() as (supervisor, report):
        started_s = asyncio.get_running_loop().time()
        await supervisor.stop()
        assert asyncio.get_running_loop().time() - started_s < 5.0
        assert not lives(report.pid)


async def test_a_replica_that_nobody_adopts_ends_with_its_grace_time(node: Node) -> None:
    node.config = replace(node.config, orphan_s=1.0)
    async with node.other_process() as supervisor:
        report = await supervisor.report()
        await supervisor.kill()
        await asyncio.sleep(0.5)
        assert lives(report.pid)
        await eventually(lambda: not lives(report.pid), 10.0)
    assert "supervisor_stays_away replica_id=r-0" in node.log


async def test_a_replica_of_another_configuration_is_ended_and_another_started(node: Node) -> None:
    async with node.other_process() as supervisor:
        before = await supervisor.report()
        await supervisor.kill()
    async with node.supervised(served_model="other") as (_, after):
        assert after.pid != before.pid
        assert after.incarnation > before.incarnation
        assert not lives(before.pid)


async def test_a_replica_has_one_living_supervisor(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "_OWNED_S", 0.5)
    async with node.supervised() as (_, report):
        second = node.supervisor()
        second.begin()
        assert "has another supervisor" in (await until(second, SupervisedState.FAILED)).error
        await second.stop()
        assert lives(report.pid)


async def test_a_supervisor_that_hangs_loses_its_replica_and_does_it_no_harm_when_it_wakes(node: Node, ask: Asked) -> None:
    async with node.other_process() as first:
        before = await first.report()
        first.signal(signal.SIGSTOP)
        async with node.supervised() as (_, after):
            assert after.pid == before.pid
            first.signal(signal.SIGCONT)
            told = await first.report()
            assert (told.state, told.pid) == (SupervisedState.FAILED, 0)
            assert "has another supervisor" in told.error
            assert await ask(after, 2) == [6, 7]


async def test_a_stopped_replica_is_killed_and_started_again(node: Node) -> None:
    async with node.supervised() as (supervisor, before):
        os.kill(before.pid, signal.SIGSTOP)
        async with asyncio.timeout(10.0):
            told = await supervisor.changed(before.version)
            after = await until(supervisor, SupervisedState.RUNNING, before.version)
        assert "was stopped by a signal" in told.error
        assert after.pid != before.pid


async def test_a_replica_that_is_stopped_for_a_moment_lives_on(node: Node) -> None:
    async with node.supervised() as (supervisor, before):
        os.kill(before.pid, signal.SIGSTOP)
        await asyncio.sleep(0.5)
        os.kill(before.pid, signal.SIGCONT)
        await asyncio.sleep(3.0)
        assert supervisor.report == before


async def test_a_replica_whose_event_loop_hangs_is_killed_and_started_again(node: Node) -> None:
    async with node.supervised(silence_s=3.0) as (supervisor, before):
        os.kill(before.pid, signal.SIGUSR1)
        told = await supervisor.changed(before.version)
        assert "did not answer 3 times" in told.error
        await until(supervisor, SupervisedState.RUNNING, before.version)


async def test_an_orphan_that_hangs_is_ended_by_its_next_supervisor(node: Node) -> None:
    async with node.other_process() as supervisor:
        before = await supervisor.report()
        os.kill(before.pid, signal.SIGSTOP)
        await supervisor.kill()
    async with node.supervised() as (_, after):
        assert after.pid != before.pid
        assert not lives(before.pid)


async def test_sigterm_lets_what_runs_end_and_takes_nothing_new(node: Node, ask: Asked) -> None:
    async with node.supervised() as (supervisor, report):
        running = asyncio.create_task(ask(report, 40))
        await asyncio.sleep(0.3)
        os.kill(report.pid, signal.SIGTERM)
        await asyncio.sleep(0.1)
        with pytest.raises(UnavailableError, match="draining"):
            await ask(report, 2)
        assert await running == list(range(6, 46))
        await eventually(lambda: not lives(report.pid), 5.0)
        await until(supervisor, SupervisedState.RUNNING, report.version)


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,)])
async def test_what_runs_too_long_at_the_end_is_cut_off(node: Node, ask: Asked, signals: tuple[signal.Signals, ...]) -> None:
    async with node.supervised(drain_s=0.2 if len(signals) == 1 else 60.0) as (_, report):
        running = asyncio.create_task(ask(report, 58))
        await asyncio.sleep(0.3)
        for number in signals:
            os.kill(report.pid, number)
            await asyncio.sleep(0.1)
        await eventually(lambda: not lives(report.pid), 5.0)
        await asyncio.gather(running, return_exceptions=True)
