"""The register in a real Redis server that dies, hangs and comes back empty; watchers and a registrar go on."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from time import monotonic

import pytest
from redis.asyncio import Redis

from tandem.errors import Reason, UnavailableError
from tandem.membership import Snapshot
from tandem.redis_register import RedisRegister
from tandem.registrar import Registrar
from tests.redis_process import Open, RedisProcess
from tests.register_bench import NEVER_S, following, ids, member, soon, until

pytest_plugins = ("tests.integration.redis_fixtures",)


class TestCancellation:
    async def test_a_cancellation_is_never_swallowed(self, open_register: Open) -> None:
        register = open_register()

        async def renew_for_ever() -> None:
            while True:
                await register.renew(member())

        async def watch() -> None:
            async with aclosing(register.snapshots(NEVER_S)) as snapshots:
                async for _ in snapshots:
                    pass

        for steps in range(400):  # each cancels at another point of what redis-py does
            tasks = {asyncio.create_task(renew_for_ever()), asyncio.create_task(watch())}
            for _ in range(1 + steps % 40):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            _, deaf = await asyncio.wait(tasks, timeout=5.0)
            assert not deaf


class TestAServerThatIsLost:
    async def test_every_call_says_unavailable(self, server: RedisProcess, open_register: Open) -> None:
        register = open_register()
        await register.renew(member())
        server.kill()
        for call in (register.snapshot, register.manual_targets, register.nudge):
            with pytest.raises(UnavailableError) as caught:
                await call()
            assert caught.value.reason is Reason.NO_REGISTER

    async def test_a_server_that_hangs_costs_no_more_than_the_timeout(self, server: RedisProcess, open_register: Open) -> None:
        register = open_register(timeout_s=0.2)
        await register.renew(member())
        server.hang()
        started_s = monotonic()
        with pytest.raises(UnavailableError):
            await register.snapshot()
        assert monotonic() - started_s < 2.0

    async def test_a_call_that_was_cancelled_leaves_no_answer_to_the_next(self, server: RedisProcess, open_register: Open) -> None:
        register = open_register()
        await register.renew(member())
        server.hang()
        for _ in range(3):
            call = asyncio.create_task(register.manual_targets())
            await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        server.go_on()
        assert ids(await register.snapshot()) == ["r1"]
        assert await register.manual_targets() == ()

    async def test_a_server_that_comes_back_empty_has_another_generation(self, server: RedisProcess, open_register: Open) -> None:
        register = open_register()
        await register.renew(member())
        before = await register.snapshot()
        epoch = await register.try_lead("a")
        server.kill()
        await server.start()
        after = await register.snapshot()
        assert after.members == ()
        assert after.generation != before.generation
        assert (await register.try_lead("b") or 0) > (epoch or 0)

    async def test_snapshots_go_on_and_the_registrar_registers_again(
        self, server: RedisProcess, open_register: Open, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        registrar = Registrar(open_register(), member(), on_fenced=lambda: None)
        registering = asyncio.create_task(registrar.run())
        async with aclosing(open_register().snapshots(1.0)) as snapshots:
            before = await following(snapshots, lambda seen: ids(seen) == ["r1"])
            waiting = asyncio.create_task(anext(snapshots))
            server.kill()
            await asyncio.sleep(1.0)
            assert not waiting.done()
            await server.start()
            first = await soon(waiting)
            after = first if first.members else await following(snapshots, lambda seen: ids(seen) == ["r1"])
        assert after.generation != before.generation
        registering.cancel()
        await asyncio.gather(registering, return_exceptions=True)
        events = sorted((record.levelname, record.getMessage().split()[0]) for record in caplog.records if "tandem" in record.name)
        assert events == [
            ("INFO", "register_back"),
            ("INFO", "registration_back"),
            ("WARNING", "register_lost"),
            ("WARNING", "registration_lost"),
        ]

    async def test_a_watcher_may_begin_before_the_server_does(self, server: RedisProcess, open_register: Open) -> None:
        server.kill()
        register = open_register()
        async with aclosing(register.nudges(NEVER_S)) as nudges:
            waiting = asyncio.create_task(anext(nudges))
            await asyncio.sleep(0.1)
            await server.start()
            await soon(waiting)
            await register.nudge()
            await soon(anext(nudges))

    async def test_a_watcher_does_not_stick_to_a_server_that_accepts_and_never_answers(
        self, server: RedisProcess, open_register: Open, tmp_path: Path
    ) -> None:
        writers: list[asyncio.StreamWriter] = []
        is_tried_again = asyncio.Event()

        async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            if len(writers) == 2:
                is_tried_again.set()

        async def watch(snapshots: AsyncGenerator[Snapshot, None], is_begun: asyncio.Event) -> None:
            async with aclosing(snapshots):
                await anext(snapshots)
                is_begun.set()
                await anext(snapshots)

        is_begun = asyncio.Event()
        watching = asyncio.create_task(watch(open_register(timeout_s=0.2).snapshots(NEVER_S), is_begun))
        try:
            await soon(is_begun.wait())
            server.kill()
            async with await asyncio.start_unix_server(say_nothing, tmp_path / "redis.sock"):
                await soon(is_tried_again.wait())
            await server.start()
            await soon(watching)
        finally:
            watching.cancel()
            for writer in writers:
                writer.close()
            await asyncio.gather(watching, *(writer.wait_closed() for writer in writers), return_exceptions=True)

    async def test_nobody_is_nudged_by_a_server_that_hangs(self, server: RedisProcess, open_register: Open) -> None:
        async with aclosing(open_register(timeout_s=0.1).nudges(0.05)) as nudges:
            await soon(anext(nudges))
            server.hang()
            waiting = asyncio.create_task(anext(nudges))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            server.go_on()
            await soon(waiting)

    async def test_waiting_for_a_lost_server_is_no_busy_loop(self, tmp_path: Path) -> None:
        tries = []

        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tries.append(monotonic())
            writer.close()
            await writer.wait_closed()

        path = tmp_path / "redis.sock"
        register = RedisRegister(f"unix://{path}", "c1")
        async with await asyncio.start_unix_server(hang_up, path):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.55), aclosing(register.snapshots(0.1)) as snapshots:
                    await anext(snapshots)
        await register.close()
        assert 2 <= len(tries) <= 6

    async def test_a_watcher_that_ends_closes_its_connections(self, open_register: Open, inside: Redis) -> None:
        register = open_register()
        before = len(await inside.client_list())

        async def are_subscribed(count: int) -> bool:
            return len(await inside.client_list(_type="pubsub")) == count

        async def are_all_closed() -> bool:
            return len(await inside.client_list()) == before

        async def watch(items: AsyncGenerator[Snapshot, None]) -> None:
            async with aclosing(items):
                async for _ in items:
                    pass

        tasks = [asyncio.create_task(watch(register.snapshots(NEVER_S))) for _ in range(3)]
        await until(lambda: are_subscribed(3))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: are_subscribed(0))
        await register.close()
        await until(are_all_closed)


class TestTheRegistrar:
    async def test_a_member_stays_registered_as_long_as_it_runs(self, open_register: Open) -> None:
        register = open_register()
        registering = asyncio.create_task(Registrar(register, member(), on_fenced=lambda: None).run())
        await asyncio.sleep(3.3)  # longer than a lease
        assert ids(await register.snapshot()) == ["r1"]
        registering.cancel()
        await asyncio.gather(registering, return_exceptions=True)
        assert (await register.snapshot()).members == ()

    async def test_the_end_is_not_held_up_by_a_server_that_hangs(self, server: RedisProcess, open_register: Open) -> None:
        register = open_register(timeout_s=20.0)

        async def is_registered() -> bool:
            return bool((await register.snapshot()).members)

        registering = asyncio.create_task(Registrar(register, member(), on_fenced=lambda: None).run())
        await until(is_registered)
        server.hang()
        registering.cancel()
        started_s = monotonic()
        await asyncio.gather(registering, return_exceptions=True)
        assert monotonic() - started_s < 5.0
