"""The register in a real Redis server: the contract, and a server that others share."""

import asyncio
from contextlib import aclosing, suppress

import pytest
from redis.asyncio import Redis

from tandem.domain import ModelId, ReplicaTarget, Role
from tandem.errors import ConfigError, InvalidRequestError
from tandem.membership import Member
from tandem.redis_register import RedisRegister
from tests.redis_process import Open
from tests.register_bench import DECODE, NEVER_S, SERVED, Bench, ids, member, soon
from tests.register_contract import LeaderContract, ManualTargetContract, RegisterContract, WatchContract

BRIEF_S = 0.2
pytest_plugins = ("tests.integration.redis_fixtures",)


@pytest.fixture
def bench(open_register: Open) -> Bench:
    async def let_leases_run_out() -> None:
        await asyncio.sleep(1.5 * BRIEF_S)

    brief = open_register(lease_s=BRIEF_S)
    return Bench(register=open_register(), brief=brief, brief_s=BRIEF_S, let_leases_run_out=let_leases_run_out)


class TestMembers(RegisterContract):
    pass


class TestWatchers(WatchContract):
    pass


class TestLeader(LeaderContract):
    pass


class TestManualTargets(ManualTargetContract):
    @pytest.mark.parametrize("expires_in_s", [-1.0, float("nan"), float("inf")])
    async def test_a_time_to_expire_that_is_none_is_refused(self, bench: Bench, expires_in_s: float) -> None:
        with pytest.raises(InvalidRequestError):
            await bench.register.set_manual_targets(
                [ReplicaTarget(model=ModelId("m"), role=Role.DECODE, replicas=1, expires_in_s=expires_in_s)]
            )


class TestASharedServer:
    async def test_two_clusters_do_not_see_each_other(self, open_register: Open) -> None:
        one, other = open_register("c1"), open_register("c2")
        await one.renew(member(incarnation=5))
        await one.publish(await one.try_lead("a") or 0, [SERVED], [DECODE])
        await one.set_manual_targets([DECODE])
        snapshot = await other.snapshot()
        assert (snapshot.members, snapshot.models, snapshot.targets) == ((), (), ())
        assert snapshot.generation != (await one.snapshot()).generation
        assert await other.manual_targets() == ()
        assert await other.try_lead("b") is not None
        await other.renew(member(incarnation=1))

    async def test_hints_stay_in_their_cluster(self, open_register: Open) -> None:
        async with aclosing(open_register("c2").snapshots(NEVER_S)) as snapshots:
            await soon(anext(snapshots))
            await open_register("c1").renew(member())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await anext(snapshots)

    async def test_keys_are_below_the_prefix_of_the_cluster(self, open_register: Open, inside: Redis) -> None:
        await use_everything(open_register())
        assert [key for key in map(str, await inside.keys()) if not key.startswith("tandem:c1:")] == []

    async def test_the_whole_server_is_never_walked(self, open_register: Open, inside: Redis) -> None:
        await use_everything(open_register())
        used = await inside.info("commandstats")
        assert {"cmdstat_get", "cmdstat_smembers"} <= used.keys()
        assert {"cmdstat_keys", "cmdstat_scan"} & used.keys() == set()

    async def test_a_renewal_without_a_change_wakes_nobody(self, open_register: Open) -> None:
        register = open_register()
        await register.renew(member())
        async with aclosing(register.snapshots(NEVER_S)) as snapshots:
            await soon(anext(snapshots))
            await register.renew(member())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await anext(snapshots)

    async def test_a_burst_of_hints_gives_few_snapshots(self, open_register: Open, inside: Redis) -> None:
        register = open_register()
        hints, snapshots_seen = 500, 0
        async with aclosing(register.snapshots(NEVER_S)) as snapshots:
            await soon(anext(snapshots))
            async with inside.pipeline() as burst:
                for _ in range(hints):
                    burst.publish("tandem:c1:changes", "member")
                assert await burst.execute() == [1] * hints  # all were delivered
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while True:
                        await anext(snapshots)
                        snapshots_seen += 1
        assert 1 <= snapshots_seen < hints / 10

    async def test_what_another_version_wrote_does_not_hide_the_rest(
        self, open_register: Open, inside: Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        register = open_register()
        await register.renew(member())
        await inside.sadd("tandem:c1:members", "gizmo:1")
        await inside.set("tandem:c1:lease:gizmo:1", '{"kind":"gizmo"}')
        await inside.set("tandem:c1:published", "[]")
        for _ in range(2):
            assert ids(await register.snapshot()) == ["r1"]
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    async def test_what_leases_leave_behind_expires(self, open_register: Open, inside: Redis) -> None:
        register = open_register(lease_s=BRIEF_S)
        await register.renew(member())
        await asyncio.sleep(1.5 * BRIEF_S)
        await register.snapshot()
        left = [key for key in map(str, await inside.keys()) if "replica:r1" in key]
        assert left == ["tandem:c1:fence:replica:r1"]
        assert 3000 < await inside.ttl(left[0]) <= 3600
        assert await inside.exists("tandem:c1:members") == 0


@pytest.mark.parametrize("cluster", ["", "a:b", "a b", "-a", "x" * 65, "a\n"])
def test_a_cluster_id_that_would_mix_keys_is_refused(cluster: str) -> None:
    with pytest.raises(ConfigError, match="cluster id"):
        RedisRegister("unix:///nowhere.sock", cluster)


async def use_everything(register: RedisRegister) -> None:
    """Each method once."""
    mine: Member = member()
    await register.renew(mine)
    await register.snapshot()
    await register.publish(await register.try_lead("a") or 0, [SERVED], [DECODE])
    await register.set_manual_targets([DECODE])
    await register.manual_targets()
    await register.nudge()
    await register.resign("a")
    await register.leave(mine)


async def test_erasing_leaves_nothing_of_the_cluster_and_all_of_others(open_register: Open, inside: Redis) -> None:
    mine, other = open_register("mine"), open_register("other")
    for register in (mine, other):
        await register.renew(member())
        epoch = await register.try_lead("a")
        assert epoch is not None
        await register.publish(epoch, [SERVED], [DECODE])
        await register.set_manual_targets([DECODE])
    before = await inside.keys("tandem:other:*")
    await mine.erase()
    assert await inside.keys("tandem:mine:*") == []
    assert sorted(await inside.keys("tandem:other:*")) == sorted(before)
