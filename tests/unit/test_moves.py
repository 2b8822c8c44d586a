"""Requests that go on elsewhere on purpose: off a draining replica, and from a crowded one to an idle one."""

import pytest

from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import Abandon, Dispatch, Instruction
from tandem.domain import ReplicaId, ReplicaState, RequestId, Role, Sampling
from tandem.errors import EngineError, Reason
from tests.core_talk import make_core, only_dispatch, only_reject, submit
from tests.samples import make_lease, make_request

SMALL = RouterConfig(rebalance_after_s=2.0)


def begin(core: RouterCore, number: int, *, prompt_tokens: int = 100, sampling: Sampling | None = None) -> RequestId:
    """A request that decodes and has its first token."""
    request = make_request(f"r{number}", prompt_tokens=prompt_tokens, sampling=sampling)
    only_dispatch(core.submit(request, block_hashes=(), deadline_s=None, now_s=0.0))
    core.tokens(request.request_id, 1, 1, 0.0)
    return request.request_id


def drain(core: RouterCore, replica_id: str = "decode-0", role: Role = Role.DECODE) -> None:
    assert not core.replica_seen(make_lease(replica_id, role, state=ReplicaState.DRAINING), 1.0)


def moved(instructions: list[Instruction]) -> list[RequestId]:
    assert all(isinstance(one, Abandon) and one.error.reason is Reason.MOVED for one in instructions)
    return [one.request_id for one in instructions]


def decode_of(core: RouterCore, instructions: list[Instruction]) -> ReplicaId:
    return only_dispatch(instructions).plan.decode.replica_id


class TestDrain:
    def test_what_runs_on_a_draining_replica_goes_on_elsewhere_at_once(self) -> None:
        core = make_core(replicas=("decode-0",))
        request_id = begin(core, 1)
        core.replica_seen(make_lease("decode-1"), 0.5)
        drain(core)
        (abandon,) = core.tick(1.1)
        assert moved([abandon]) == [request_id]
        assert isinstance(abandon, Abandon)
        assert decode_of(core, core.failed(request_id, 1, abandon.error, 1.1)) == "decode-1"
        core.check_invariants()
        assert core.tick(1.2) == []

    def test_it_is_told_once_while_it_ends(self) -> None:
        core = make_core(replicas=("decode-0",))
        begin(core, 1)
        core.replica_seen(make_lease("decode-1"), 0.5)
        drain(core)
        assert len(core.tick(1.1)) == 1
        assert core.tick(1.2) == []

    def test_many_go_a_few_at_a_time(self) -> None:
        core = make_core(replicas=("decode-0",))
        ids = [begin(core, number) for number in range(20)]
        core.replica_seen(make_lease("decode-1"), 0.5)
        drain(core)
        gone = [moved(core.tick(1.1 + tick)) for tick in range(4)]
        assert [len(some) for some in gone] == [8, 8, 4, 0]
        assert sorted(one for some in gone for one in some) == sorted(ids)

    def test_a_move_costs_nothing_of_the_retry_budget(self) -> None:
        core = make_core(config=RouterConfig(one_worker_max_tokens=0, retry_budget=1), replicas=("decode-0",))
        request_id = begin(core, 1)
        for attempt, name in ((1, "decode-1"), (2, "decode-2"), (3, "decode-3")):
            core.replica_seen(make_lease(name), 1.0)
            drain(core, f"decode-{attempt - 1}")
            (abandon,) = core.tick(1.0)
            assert isinstance(abandon, Abandon)
            assert decode_of(core, core.failed(request_id, attempt, abandon.error, 1.0)) == name
            core.tokens(request_id, attempt + 1, 1, 1.0)
        lost = EngineError("lost")
        core.replica_seen(make_lease("decode-4"), 1.0)
        assert decode_of(core, core.failed(request_id, 4, lost, 1.0)) == "decode-4"
        assert only_reject(core.failed(request_id, 5, lost, 1.0)).error is lost

    def test_where_nobody_else_would_take_it_it_stays(self) -> None:
        core = make_core(replicas=("decode-0",))
        begin(core, 1)
        drain(core)
        assert core.tick(1.1) == []

    def test_a_replica_of_the_other_role_will_do(self) -> None:
        core = make_core(replicas=("decode-0",))
        begin(core, 1)
        core.replica_seen(make_lease("prefill-0", Role.PREFILL), 0.5)
        drain(core)
        assert len(core.tick(1.1)) == 1

    def test_what_has_no_token_yet_is_left_to_its_prefill(self) -> None:
        core = make_core(replicas=("decode-0",))
        submit(core)
        core.replica_seen(make_lease("decode-1"), 0.5)
        drain(core)
        assert core.tick(1.1) == []

    def test_what_would_not_go_on_exactly_stays(self) -> None:
        core = make_core(replicas=("decode-0",))
        begin(core, 1, sampling=Sampling(max_tokens=16, n=2))
        core.replica_seen(make_lease("decode-1"), 0.5)
        drain(core)
        assert core.tick(1.1) == []


class TestRebalance:
    def crowded(self, *, idle: bool = True, config: RouterConfig = SMALL) -> RouterCore:
        """decode-0 holds eight requests of 2,000 tokens in room for 32,000; decode-1 nothing."""
        core = make_core(config=config, replicas=("decode-0",))
        for number in range(8):
            begin(core, number, prompt_tokens=2000)
        if idle:
            core.replica_seen(make_lease("decode-1"), 0.0)
        return core

    def test_one_at_a_time_after_a_while(self) -> None:
        core = self.crowded()
        assert core.tick(10.0) == []
        assert core.tick(11.9) == []
        assert len(core.tick(12.0)) == 1
        assert core.tick(12.1) == []
        assert len(core.tick(14.0)) == 1

    def test_it_ends_once_they_are_nearly_even(self) -> None:
        core, moves = self.crowded(), 0
        for tick in range(100):
            for abandon in core.tick(10.0 + tick):
                assert isinstance(abandon, Abandon)
                moves += 1
                (dispatch,) = core.failed(abandon.request_id, abandon.attempt, abandon.error, 10.0 + tick)
                assert isinstance(dispatch, Dispatch)
                assert dispatch.plan.decode.replica_id == "decode-1"
                core.tokens(abandon.request_id, dispatch.attempt, 1, 10.0 + tick)
        assert moves in (2, 3)
        core.check_invariants()

    def test_a_short_imbalance_is_left_alone(self) -> None:
        core = self.crowded()
        core.tick(10.0)
        core.replica_seen(make_lease("decode-1", state=ReplicaState.DRAINING), 10.5)
        core.tick(11.0)
        core.replica_seen(make_lease("decode-1"), 11.5)
        assert core.tick(12.5) == []

    def test_nothing_is_moved_where_all_are_one_replica_s(self) -> None:
        core = self.crowded(idle=False)
        core.tick(10.0)
        assert core.tick(20.0) == []

    @pytest.mark.parametrize("requests", [3, 8])
    def test_few_requests_and_little_memory_are_no_crowd(self, requests: int) -> None:
        core = make_core(config=SMALL, replicas=("decode-0",))
        for number in range(requests):
            begin(core, number, prompt_tokens=4000 if requests == 3 else 100)
        core.replica_seen(make_lease("decode-1"), 0.0)
        core.tick(10.0)
        assert core.tick(20.0) == []

    def test_a_request_that_would_turn_the_gap_round_stays(self) -> None:
        core = make_core(config=SMALL, replicas=("decode-0",))
        for number in range(4):
            begin(core, number, prompt_tokens=100)
        begin(core, 9, prompt_tokens=9000, sampling=Sampling(max_tokens=16, n=2))
        for number in range(4):
            begin(core, 10 + number, prompt_tokens=100, sampling=Sampling(max_tokens=16, n=2))
        core.replica_seen(make_lease("decode-1"), 0.0)
        core.tick(10.0)
        first = moved(core.tick(20.0))
        assert len(first) == 1
        assert first[0] in {f"r{number}" for number in range(4)}

    def test_what_cannot_be_moved_stays_crowded(self) -> None:
        core = make_core(config=SMALL, replicas=("decode-0",))
        for number in range(8):
            begin(core, number, prompt_tokens=2000, sampling=Sampling(max_tokens=16, n=2))
        core.replica_seen(make_lease("decode-1"), 0.0)
        core.tick(10.0)
        assert core.tick(20.0) == []


def test_who_was_moved_may_come_back_later() -> None:
    """Neither the replica it left nor the one it went to has failed it."""
    core = make_core(replicas=("decode-0",))
    request_id = begin(core, 1)
    core.replica_seen(make_lease("decode-1"), 0.5)
    drain(core)
    (abandon,) = core.tick(1.1)
    assert isinstance(abandon, Abandon)
    assert decode_of(core, core.failed(request_id, 1, abandon.error, 1.1)) == "decode-1"
    core.tokens(request_id, 2, 1, 1.2)
    core.replica_seen(make_lease("decode-0"), 1.3)
    drain(core, "decode-1")
    (abandon,) = core.tick(1.4)
    assert isinstance(abandon, Abandon)
    assert decode_of(core, core.failed(request_id, 2, abandon.error, 1.4)) == "decode-0"
