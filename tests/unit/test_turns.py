"""Who of the waiting goes now, and what keeps a line waiting. A prompt of 2,048 tokens is a chunk and takes 127 ms."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from router.config import QueueOrder, RouterConfig
from router.tracked import Tracked
from tandem.domain import ModelId, ReplicaId, ReplicaState, RequestId, Role, Slo, WorkerLoad
from tests.router_parts import HANDING_OFF, FixedShares, RouterParts, distrust, make_tracked
from tests.router_queue import D0, P0, P1, Queue
from tests.samples import make_lease

CHUNK = 2048


def chunks(*names: str, **changes: int) -> list[Tracked]:
    return [make_tracked(name, CHUNK, arrival=number, **changes) for number, name in enumerate(names)]


class TestLineUp:
    def test_a_request_waits_in_the_line_of_its_worker_with_the_seconds_of_its_prefill(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        tracked = make_tracked(ttft_s=4.0)
        work_s = parts.wait(tracked)
        (waiting,) = parts.lines[P0]
        assert tracked.assignment is not None
        assert work_s == waiting.work_s == tracked.assignment.own_s > 0.0
        assert (waiting.latest_start_s, waiting.rank_s) == (4.0 - work_s, 4.0 - work_s)
        assert (waiting.tokens, waiting.tenant) == (192, "default")

    def test_without_a_worker_it_waits_for_one(self) -> None:
        parts = Queue("decode-0")
        parts.fleet.lose(D0, 1, 0.0)
        work_s = parts.wait(make_tracked())
        assert parts.lines.homeless(ModelId("m")) == ("r1",)
        assert work_s == parts.planner.alone_s(make_tracked()) > 0.0

    def test_what_has_begun_goes_before_all_else(self) -> None:
        parts = Queue("decode-0")
        begun = make_tracked("begun", ttft_s=99.0, priority=5, resume_token_ids=(1, 2))
        parts.wait(make_tracked("urgent", 10, ttft_s=0.1, priority=-1000), begun)
        assert parts.go(D0) == ["begun", "urgent"]

    def test_the_first_prediction_is_kept(self) -> None:
        parts = Queue("prefill-0", "prefill-1", "decode-0")
        tracked = make_tracked()
        parts.wait(tracked)
        first = tracked.first_assignment
        parts.fleet.lose(P0, 1, 0.0)
        parts.queue.scatter(P0, 0.0)
        assert tracked.first_assignment is first
        assert tracked.assignment is not None
        assert tracked.assignment.worker.replica_id == P1

    def test_leaving_again_is_no_harm(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        tracked = make_tracked()
        parts.wait(tracked)
        for _ in range(2):
            parts.queue.leave(tracked)
            assert tracked.assignment is None
            assert len(parts.lines) == 0


class TestOrder:
    def names(self, config: RouterConfig, waits: Iterable[Tracked], now_s: float = 0.0) -> list[str]:
        parts = Queue("prefill-0", "decode-0", config=replace(config, ahead_s=99.0))
        parts.wait(*waits)
        return parts.go(now_s=now_s)

    def test_the_latest_start_is_what_the_objective_leaves_after_the_prefill(self) -> None:
        waits = [make_tracked("short", 192, ttft_s=1.0), make_tracked("long", 4096, ttft_s=1.1)]
        assert self.names(HANDING_OFF, waits) == ["long", "short"]

    def test_who_is_late_waits_for_those_who_are_not(self) -> None:
        waits = [make_tracked(name, ttft_s=ttft_s, slo=Slo(ttft_s=ttft_s)) for name, ttft_s in (("late", 1.0), ("soon", 3.0))]
        assert self.names(HANDING_OFF, waits, 2.0) == ["soon", "late"]

    def test_without_an_objective_of_its_own_nobody_is_late(self) -> None:
        waits = [make_tracked(name, ttft_s=ttft_s) for name, ttft_s in (("first", 1.0), ("second", 3.0))]
        assert self.names(HANDING_OFF, waits, 2.0) == ["first", "second"]

    def test_shortest_first_goes_by_the_work(self) -> None:
        config = replace(HANDING_OFF, queue_order=QueueOrder.SHORTEST)
        waits = [make_tracked("long", 4096, ttft_s=0.1), make_tracked("short", 192), make_tracked("middle", 1000)]
        assert self.names(config, waits) == ["short", "middle", "long"]

    def test_a_second_of_wait_outweighs_half_a_second_of_work(self) -> None:
        config = replace(HANDING_OFF, queue_order=QueueOrder.SHORTEST, queue_ageing=0.5)
        parts = RouterParts("prefill-0", "decode-0")
        apart_s = 2 * (parts.assign(make_tracked(prompt_tokens=4096)).own_s - parts.assign(make_tracked()).own_s)
        for waited_s, order in ((apart_s - 0.01, ["new", "old"]), (apart_s + 0.01, ["old", "new"])):
            waits = [make_tracked("old", 4096, arrived_s=0.0), make_tracked("new", 192, arrived_s=waited_s, arrival=2)]
            assert self.names(config, waits) == order

    def test_tenants_take_turns_by_their_shares(self) -> None:
        parts = Queue("prefill-0", "decode-0", config=replace(HANDING_OFF, ahead_s=99.0), shares=FixedShares("b", "a"))
        parts.wait(make_tracked("r1", tenant="a", ttft_s=1.0), make_tracked("r2", tenant="b", ttft_s=5.0))
        assert parts.go() == ["r2", "r1"]


class TestAhead:
    def test_a_worker_is_given_one_chunk_ahead_and_no_more(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        parts.wait(*chunks("r1", "r2", "r3"))
        assert parts.go() == ["r1", "r2"]
        assert parts.next() is None

    def test_it_gets_the_next_when_time_has_passed(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        parts.wait(*chunks("r1", "r2", "r3"))
        parts.go()
        assert parts.go(now_s=0.05) == []
        assert parts.go(now_s=0.09) == ["r3"]

    def test_what_has_begun_is_not_held_back_by_it(self) -> None:
        parts = Queue("decode-0")
        parts.wait(make_tracked("begun", resume_token_ids=(1, 2)))
        parts.give("decode-0", 99.0)
        assert parts.go(D0) == ["begun"]

    def test_a_line_that_is_not_due_is_looked_at_when_its_worker_has_news(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        parts.wait(*chunks("r1", "r2", "r3"))
        parts.go()
        assert parts.queue.lines_due((), 0.0) == []
        assert parts.queue.lines_due([P0], 0.0) == [P0]


class TestStuck:
    def test_a_line_without_a_slot_is_looked_at_when_anything_has_ended(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        parts.wait(make_tracked())
        assert parts.next(has_slot=False) is None
        assert parts.queue.lines_due((), 0.0) == [P0]
        assert parts.go() == ["r1"]
        assert parts.queue.lines_due((), 0.0) == []

    def test_a_line_without_decode_room_too(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        parts.wait(make_tracked())
        parts.report("decode-0", running_requests=64)
        assert parts.next() is None
        assert parts.queue.lines_due((), 0.0) == [P0]
        parts.engine("decode-0", max_num_seqs=65)
        assert parts.go() == ["r1"]

    def test_the_most_urgent_line_is_looked_at_first(self) -> None:
        parts = Queue("prefill-0", "prefill-1", "decode-0")
        parts.wait(make_tracked("r1", ttft_s=5.0), make_tracked("r2", ttft_s=2.0))
        assert parts.queue.lines_due([P0, P1], 0.0) == [P1, P0]
        parts.wait(make_tracked("r3", priority=-1, ttft_s=9.0))
        assert parts.queue.lines_due([P0, P1], 0.0) == [P0, P1]

    def test_a_line_that_has_emptied_is_forgotten(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        tracked = make_tracked()
        parts.wait(tracked)
        parts.next(has_slot=False)
        parts.queue.leave(tracked)
        assert parts.queue.lines_due([P1], 0.0) == []
        assert parts.next() is None


class TestSecondLook:
    @pytest.mark.parametrize(
        ("is_sheddable", "may_shed", "now_s", "is_shed"),
        [(True, True, 1.5, True), (True, True, 0.5, False), (False, True, 1.5, False), (True, False, 1.5, False)],
        ids=["late", "in time", "not sheddable", "predictions not trusted"],
    )
    def test_a_sheddable_request_whose_turn_comes_too_late_is_shed(
        self, is_sheddable: bool, may_shed: bool, now_s: float, is_shed: bool
    ) -> None:
        parts = Queue("prefill-0", "decode-0")
        parts.wait(make_tracked(ttft_s=1.0, sheddable=is_sheddable))
        if not may_shed:
            distrust(parts.predictor)
        turn = parts.next(now_s=now_s)
        assert turn is not None
        assert (turn.placement is None) == is_shed


class TestRethinking:
    """Both decode workers serve short prompts by themselves, one at a time."""

    def full(self) -> tuple[Queue, Tracked]:
        parts = Queue("decode-0", "decode-1")
        for name in ("decode-0", "decode-1"):
            parts.engine(name, max_num_seqs=1)
            parts.report(name, running_requests=1)
        tracked = make_tracked(prompt_tokens=10)
        parts.wait(tracked)
        assert parts.go(D0) == []
        return parts, tracked

    def test_who_should_have_gone_by_now_goes_where_there_is_room(self) -> None:
        parts, tracked = self.full()
        assert parts.ledger.report(ReplicaId("decode-1"), 1, 2, WorkerLoad())
        parts.queue.rethink(0.5)
        assert parts.go(D0) == []
        parts.queue.rethink(1.1)
        parts.lines.check_invariants()
        assert tracked.assignment is not None
        assert tracked.assignment.worker.replica_id == "decode-1"
        assert parts.go(ReplicaId("decode-1"), 1.1) == ["r1"]

    def test_where_nothing_is_better_it_stays_and_is_thought_of_again_later(self) -> None:
        parts, tracked = self.full()
        parts.queue.rethink(1.1)
        assert set(parts.lines) == {D0}
        assert tracked.rethink_s > 2.0

    def test_a_line_of_a_worker_that_is_gone_is_left_alone(self) -> None:
        parts, _ = self.full()
        parts.fleet.lose(D0, 1, 0.0)
        parts.queue.rethink(9.0)
        assert set(parts.lines) == {D0}


class TestMoving:
    def test_the_line_of_a_draining_worker_goes_to_others(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        parts.wait(*chunks("r1", "r2", "r3"))
        parts.see(make_lease("prefill-1", Role.PREFILL))
        parts.see(make_lease("prefill-0", Role.PREFILL, state=ReplicaState.DRAINING))
        parts.queue.scatter(P0, 0.0)
        parts.lines.check_invariants()
        assert set(parts.lines) == {P1}
        assert parts.go(P1) == ["r1", "r2"]

    def test_without_others_they_wait_without_a_worker(self) -> None:
        parts = Queue("decode-0")
        parts.wait(*chunks("r1", "r2"))
        parts.fleet.lose(D0, 1, 0.0)
        parts.queue.scatter(D0, 0.0)
        assert parts.lines.homeless(ModelId("m")) == ("r1", "r2")
        assert parts.queue.house(ModelId("m"), 0.0) == []

    def test_they_are_housed_when_one_comes(self) -> None:
        parts = Queue("decode-0")
        parts.fleet.lose(D0, 1, 0.0)
        parts.wait(*chunks("r1", "r2"))
        parts.see(make_lease("decode-1"))
        assert parts.queue.house(ModelId("m"), 0.0) == ["decode-1", "decode-1"]
        assert parts.lines.homeless_models == ()
        assert parts.queue.house(ModelId("m"), 0.0) == []

    def test_those_who_are_held_back_from_it_stay_without(self) -> None:
        parts = Queue("decode-0")
        tracked = make_tracked()
        tracked.avoid.add((D0, 1))
        tracked.hold_until_s = 1.0
        parts.wait(tracked)
        assert parts.queue.house(ModelId("m"), 0.5) == []
        assert parts.lines.homeless(ModelId("m")) == ("r1",)
        assert parts.queue.house(ModelId("m"), 1.0) == ["decode-0"]

    def test_scattering_a_line_that_is_not_there_is_no_harm(self) -> None:
        Queue("decode-0").queue.scatter(D0, 0.0)

    def test_a_worker_that_is_gone_gives_no_turn(self) -> None:
        parts = Queue("prefill-0", "decode-0")
        parts.wait(make_tracked())
        parts.fleet.lose(P0, 1, 0.0)
        assert parts.next() is None
        assert RequestId("r1") in set(parts.lines.requests)


class AheadOfOthers(FixedShares):
    """Everybody here is ahead of somebody who waits at another router."""

    def must_wait(self, tenant: str) -> bool:
        return True


def test_another_routers_tenant_goes_first_while_the_worker_has_work() -> None:
    parts = Queue("prefill-0", "decode-0", shares=AheadOfOthers())
    parts.wait(make_tracked())
    parts.give("prefill-0", 0.01)
    assert parts.next() is None


def test_a_worker_is_not_left_idle_for_another_routers_tenant() -> None:
    parts = Queue("prefill-0", "decode-0", shares=AheadOfOthers())
    parts.wait(make_tracked())
    assert parts.next() is not None
