"""What every register keeps to. Classes of tests: a file with an implementation inherits them and gives the `bench` fixture."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from tandem.domain import ModelId, ReplicaTarget, Role
from tandem.errors import PreconditionError, Reason
from tandem.membership import MemberKind
from tests.register_bench import DECODE, MODEL, NEVER_S, PREFILL, SERVED, Bench, following, ids, member, soon


class RegisterContract:
    async def test_an_empty_register_has_nobody_and_a_generation(self, bench: Bench) -> None:
        snapshot = await bench.register.snapshot()
        assert (snapshot.members, snapshot.models, snapshot.targets) == ((), (), ())
        assert snapshot.generation

    async def test_a_member_is_seen_as_it_registered(self, bench: Bench) -> None:
        mine = replace(member(address="127.0.0.1:1", state="ready"), node="n1", pid=7, model="m", role="decode", namespace="ns")
        await bench.register.renew(mine)
        assert (await bench.register.snapshot()).members == (mine,)

    async def test_members_are_in_order_of_kind_and_id(self, bench: Bench) -> None:
        members = [member("b"), member("a"), member("z", kind=MemberKind.AUTOSCALER), member("c", kind=MemberKind.ROUTER)]
        for item in members:
            await bench.register.renew(item)
        assert ids(await bench.register.snapshot()) == ["z", "a", "b", "c"]

    async def test_one_id_may_be_used_by_two_kinds(self, bench: Bench) -> None:
        await bench.register.renew(member("x", incarnation=9))
        await bench.register.renew(member("x", incarnation=1, kind=MemberKind.ROUTER))
        assert ids(await bench.register.snapshot()) == ["x", "x"]

    async def test_the_generation_stays_while_members_come_and_go(self, bench: Bench) -> None:
        before = (await bench.register.snapshot()).generation
        await bench.register.renew(member())
        await bench.register.leave(member())
        assert (await bench.register.snapshot()).generation == before

    async def test_a_lease_runs_out(self, bench: Bench) -> None:
        await bench.brief.renew(member())
        await bench.let_leases_run_out()
        assert (await bench.register.snapshot()).members == ()

    async def test_a_lease_that_ran_out_is_taken_again(self, bench: Bench) -> None:
        await bench.brief.renew(member())
        await bench.let_leases_run_out()
        await bench.register.renew(member())
        assert ids(await bench.register.snapshot()) == ["r1"]

    async def test_a_member_that_left_is_gone(self, bench: Bench) -> None:
        await bench.register.renew(member())
        await bench.register.leave(member())
        assert (await bench.register.snapshot()).members == ()

    async def test_a_member_that_left_may_come_back(self, bench: Bench) -> None:
        await bench.register.renew(member())
        await bench.register.leave(member())
        await bench.register.renew(member())
        assert ids(await bench.register.snapshot()) == ["r1"]

    async def test_leaving_twice_is_fine(self, bench: Bench) -> None:
        await bench.register.leave(member())
        await bench.register.renew(member())
        await bench.register.leave(member())
        await bench.register.leave(member())

    async def test_a_newer_incarnation_takes_over(self, bench: Bench) -> None:
        await bench.register.renew(member(incarnation=1))
        await bench.register.renew(member(incarnation=2, address="new"))
        assert (await bench.register.snapshot()).members == (member(incarnation=2, address="new"),)

    # The last pair differs by one in nanoseconds since 1970: more than a double holds.
    @pytest.mark.parametrize(("older", "newer"), [(1, 2), (9, 10), (1753000000000000000, 1753000000000000001)])
    async def test_an_older_incarnation_is_refused(self, bench: Bench, older: int, newer: int) -> None:
        await bench.register.renew(member(incarnation=newer))
        with pytest.raises(PreconditionError) as caught:
            await bench.register.renew(member(incarnation=older))
        assert caught.value.reason is Reason.STALE_INCARNATION
        assert (await bench.register.snapshot()).members == (member(incarnation=newer),)

    async def test_an_older_incarnation_is_refused_after_the_lease_ran_out(self, bench: Bench) -> None:
        await bench.brief.renew(member(incarnation=2))
        await bench.let_leases_run_out()
        with pytest.raises(PreconditionError):
            await bench.register.renew(member(incarnation=1))

    async def test_an_older_incarnation_is_refused_after_the_newer_one_left(self, bench: Bench) -> None:
        await bench.register.renew(member(incarnation=2))
        await bench.register.leave(member(incarnation=2))
        with pytest.raises(PreconditionError):
            await bench.register.renew(member(incarnation=1))

    async def test_an_older_incarnation_cannot_make_the_newer_one_leave(self, bench: Bench) -> None:
        await bench.register.renew(member(incarnation=1))
        await bench.register.renew(member(incarnation=2))
        await bench.register.leave(member(incarnation=1))
        assert ids(await bench.register.snapshot()) == ["r1"]


class WatchContract:
    async def test_snapshots_begin_with_one_now(self, bench: Bench) -> None:
        await bench.register.renew(member())
        async with aclosing(bench.register.snapshots(NEVER_S)) as snapshots:
            assert ids(await soon(anext(snapshots))) == ["r1"]

    async def test_a_change_is_seen_well_before_the_poll(self, bench: Bench) -> None:
        async with aclosing(bench.register.snapshots(NEVER_S)) as snapshots:
            await soon(anext(snapshots))
            await bench.register.renew(member(state="starting"))
            await following(snapshots, lambda seen: ids(seen) == ["r1"])
            await bench.register.renew(member(state="ready"))
            await following(snapshots, lambda seen: seen.members[0].state == "ready")
            await bench.register.leave(member())
            await following(snapshots, lambda seen: seen.members == ())

    async def test_a_change_between_two_items_is_not_missed(self, bench: Bench) -> None:
        async with aclosing(bench.register.snapshots(NEVER_S)) as snapshots:
            await soon(anext(snapshots))
            for number in range(20):
                await bench.register.renew(member(f"r{number:02}"))
            await following(snapshots, lambda seen: len(seen.members) == 20)

    async def test_the_leaders_word_is_seen_well_before_the_poll(self, bench: Bench) -> None:
        async with aclosing(bench.register.snapshots(NEVER_S)) as snapshots:
            await soon(anext(snapshots))
            await bench.register.publish(1, [SERVED], [])
            await following(snapshots, lambda seen: seen.models == (SERVED,))

    async def test_all_watchers_see_a_change(self, bench: Bench) -> None:
        async with aclosing(bench.register.snapshots(NEVER_S)) as one, aclosing(bench.register.snapshots(NEVER_S)) as other:
            await soon(anext(one))
            await soon(anext(other))
            await bench.register.renew(member())
            await following(one, lambda seen: ids(seen) == ["r1"])
            await following(other, lambda seen: ids(seen) == ["r1"])

    async def test_a_watcher_that_is_cancelled_ends(self, bench: Bench) -> None:
        async def watch() -> None:
            async with aclosing(bench.register.snapshots(NEVER_S)) as snapshots:
                async for _ in snapshots:
                    pass

        task = asyncio.create_task(watch())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(task)

    async def test_a_nudge_wakes_the_leader(self, bench: Bench) -> None:
        async with aclosing(bench.register.nudges(NEVER_S)) as nudges:
            await soon(anext(nudges))
            await bench.register.nudge()
            await soon(anext(nudges))

    async def test_manual_targets_wake_the_leader(self, bench: Bench) -> None:
        async with aclosing(bench.register.nudges(NEVER_S)) as nudges:
            await soon(anext(nudges))
            await bench.register.set_manual_targets([DECODE])
            await soon(anext(nudges))


class LeaderContract:
    async def test_the_first_candidate_leads_and_the_second_does_not(self, bench: Bench) -> None:
        epoch = await bench.register.try_lead("a")
        assert epoch is not None
        assert epoch > 0
        assert await bench.register.try_lead("b") is None

    async def test_a_leader_that_goes_on_keeps_its_epoch(self, bench: Bench) -> None:
        epoch = await bench.register.try_lead("a")
        assert await bench.register.try_lead("a") == epoch

    async def test_the_epoch_grows_with_each_change_of_hands(self, bench: Bench) -> None:
        epochs = []
        for candidate in ("a", "b", "a", "a"):
            epochs.append(await bench.register.try_lead(candidate) or 0)
            await bench.register.resign(candidate)
        assert epochs == sorted(set(epochs))

    async def test_a_leader_that_is_silent_is_replaced(self, bench: Bench) -> None:
        first = await bench.brief.try_lead("a")
        await bench.let_leases_run_out()
        second = await bench.register.try_lead("b")
        assert first is not None
        assert second is not None
        assert second > first
        assert await bench.register.try_lead("a") is None

    async def test_only_the_leader_can_resign(self, bench: Bench) -> None:
        await bench.register.try_lead("a")
        await bench.register.resign("b")
        assert await bench.register.try_lead("b") is None

    async def test_the_leaders_word_is_in_the_snapshot(self, bench: Bench) -> None:
        epoch = await bench.register.try_lead("a") or 0
        await bench.register.publish(epoch, [SERVED], [PREFILL, DECODE])
        snapshot = await bench.register.snapshot()
        assert (snapshot.models, snapshot.targets) == ((SERVED,), (PREFILL, DECODE))

    async def test_an_older_leader_cannot_publish(self, bench: Bench) -> None:
        older = await bench.register.try_lead("a") or 0
        await bench.register.resign("a")
        newer = await bench.register.try_lead("b") or 0
        await bench.register.publish(newer, [SERVED], [DECODE])
        with pytest.raises(PreconditionError) as caught:
            await bench.register.publish(older, [], [])
        assert caught.value.reason is Reason.STALE_EPOCH
        assert (await bench.register.snapshot()).targets == (DECODE,)

    async def test_an_older_leader_cannot_publish_before_the_newer_one_has(self, bench: Bench) -> None:
        older = await bench.register.try_lead("a") or 0
        await bench.register.resign("a")
        await bench.register.try_lead("b")
        with pytest.raises(PreconditionError):
            await bench.register.publish(older, [SERVED], [])

    async def test_an_empty_register_takes_the_word_of_any_epoch(self, bench: Bench) -> None:
        await bench.register.publish(7, [SERVED], [])
        assert (await bench.register.snapshot()).models == (SERVED,)
        with pytest.raises(PreconditionError):
            await bench.register.publish(6, [], [])


class ManualTargetContract:
    async def test_manual_targets_stay_until_replaced(self, bench: Bench) -> None:
        await bench.register.set_manual_targets([PREFILL, DECODE])
        await bench.let_leases_run_out()
        assert await bench.register.manual_targets() == (DECODE, PREFILL)

    async def test_a_manual_target_is_replaced_by_model_and_role(self, bench: Bench) -> None:
        other = ReplicaTarget(model=ModelId("org/other:v1"), role=Role.DECODE, replicas=0)
        await bench.register.set_manual_targets([DECODE, other])
        newer = ReplicaTarget(model=MODEL, role=Role.DECODE, replicas=1)
        await bench.register.set_manual_targets([newer])
        assert await bench.register.manual_targets() == (newer, other)

    async def test_a_manual_target_expires(self, bench: Bench) -> None:
        brief = ReplicaTarget(model=MODEL, role=Role.DECODE, replicas=3, expires_in_s=bench.brief_s)
        await bench.register.set_manual_targets([brief, PREFILL])
        await bench.let_leases_run_out()
        assert await bench.register.manual_targets() == (PREFILL,)

    async def test_a_manual_target_tells_the_time_that_is_left(self, bench: Bench) -> None:
        await bench.register.set_manual_targets([ReplicaTarget(model=MODEL, role=Role.DECODE, replicas=3, expires_in_s=90.0)])
        (target,) = await bench.register.manual_targets()
        assert (target.replicas, 60.0 < target.expires_in_s <= 90.0) == (3, True)

    async def test_a_negative_count_ends_a_manual_target(self, bench: Bench) -> None:
        await bench.register.set_manual_targets([PREFILL, DECODE])
        await bench.register.set_manual_targets([ReplicaTarget(model=MODEL, role=Role.DECODE, replicas=-1)])
        assert await bench.register.manual_targets() == (PREFILL,)
