"""What a replica has accepted, and who is told of it."""

import asyncio
from dataclasses import replace

import pytest

from tandem.domain import ReplicaState, RequestId, Stamp, StampKind
from tandem.errors import InvalidRequestError, Reason, UnavailableError
from tandem.step_sample import StepSample
from tandem.worker_state import MAX_MESSAGE_STEPS, WorkerState, tokens_to_compute
from tests.samples import make_lease, make_request

MINUTE_S = 60.0


def make_state() -> WorkerState:
    return WorkerState(make_lease(incarnation=7))


def stamp(kind: StampKind, request_id: str = "r", attempt: int = 1) -> Stamp:
    return Stamp(request_id=RequestId(request_id), attempt=attempt, kind=kind)


def test_an_attempt_counts_for_as_long_as_it_runs() -> None:
    state = make_state()
    with state.accept("router", "r", 1, prefill_tokens=10, kv_tokens=12):
        with state.accept("router", "s", 1, prefill_tokens=0, kv_tokens=5):
            assert (state.running_requests, state.pending_prefill_tokens, state.kv_tokens) == (2, 10, 17)
        assert (state.running_requests, state.pending_prefill_tokens, state.kv_tokens) == (1, 10, 12)
    assert (state.running_requests, state.pending_prefill_tokens, state.kv_tokens) == (0, 0, 0)


@pytest.mark.parametrize(("planned_tokens", "tokens"), [(0, 103), (7, 7), (103, 103), (2**32 - 1, 103)])
def test_what_is_to_be_computed_is_as_planned_and_no_more_than_there_is(planned_tokens: int, tokens: int) -> None:
    assert tokens_to_compute(planned_tokens, make_request("r", 100, resume_token_ids=(1, 2, 3))) == tokens


def test_an_attempt_that_fails_is_freed_too() -> None:
    state = make_state()
    with pytest.raises(ZeroDivisionError), state.accept("router", "r", 1, prefill_tokens=10, kv_tokens=12):
        raise ZeroDivisionError
    assert state.running_requests == 0


def test_the_same_attempt_twice_is_counted_twice() -> None:
    state = make_state()
    with state.accept("a", "r", 1, prefill_tokens=1, kv_tokens=1), state.accept("b", "r", 1, prefill_tokens=1, kv_tokens=1):
        assert state.running_requests == 2
    assert state.running_requests == 0


def test_a_prompt_is_pending_until_its_first_token_has_left() -> None:
    state = make_state()
    with state.accept("router", "r", 1, prefill_tokens=10, kv_tokens=12) as run:
        state.prefilled(run)
        assert (state.pending_prefill_tokens, state.kv_tokens) == (0, 12)


def test_a_prompt_that_is_computed_here_after_all_is_pending() -> None:
    state = make_state()
    with state.accept("router", "r", 1, prefill_tokens=0, kv_tokens=12) as run:
        state.must_prefill(run, 12)
        assert state.pending_prefill_tokens == 12


def test_output_tokens_hold_kv_while_the_attempt_runs_and_stay_in_the_total() -> None:
    state = make_state()
    with state.accept("router", "r", 1, prefill_tokens=10, kv_tokens=12) as run:
        state.generated(run, 1)
        state.generated(run, 4)
        assert state.kv_tokens == 17
    assert state.kv_tokens == 0
    assert state.generated_tokens_total == 5


@pytest.mark.parametrize("incarnation", [0, 7])
def test_work_for_this_incarnation_or_any_is_taken(incarnation: int) -> None:
    make_state().check("m", incarnation)


def test_work_for_another_incarnation_is_refused() -> None:
    with pytest.raises(UnavailableError, match=r"decode-0 is incarnation 7, not 6") as caught:
        make_state().check("m", 6)
    assert caught.value.reason is Reason.STALE_INCARNATION


def test_work_that_means_another_replica_or_model_is_refused() -> None:
    with pytest.raises(UnavailableError, match="this is decode-0, not decode-1") as caught:
        make_state().check("m", 7, "decode-1")
    assert caught.value.reason is Reason.STALE_INCARNATION
    make_state().check("m", 7, "decode-0", "ns")
    with pytest.raises(UnavailableError, match="decode-0 has blocks of ns, not of other"):
        make_state().check("m", 7, "decode-0", "other")
    with pytest.raises(InvalidRequestError, match="decode-0 serves 'm', not 'other'") as refused:
        make_state().check("other", 7)
    assert not refused.value.retryable


def test_a_draining_replica_takes_no_work() -> None:
    state = make_state()
    state.drain()
    assert state.lease.state is ReplicaState.DRAINING
    with pytest.raises(UnavailableError) as caught:
        state.check("m", 7)
    assert (caught.value.reason, caught.value.retryable) == (Reason.DRAINING, True)


def test_addresses_become_part_of_the_lease() -> None:
    state = make_state()
    state.set_addresses("host:1", "host:2")
    assert (state.lease.address, state.lease.metrics_address) == ("host:1", "host:2")


class TestWatching:
    async def test_a_router_gets_the_stamps_of_its_own_requests_once(self) -> None:
        state = make_state()
        with state.watch("mine") as watcher:
            with state.accept("mine", "r", 1, prefill_tokens=1, kv_tokens=1), state.accept("other", "s", 1, prefill_tokens=1, kv_tokens=1):
                assert await watcher.changed(MINUTE_S) == [stamp(StampKind.ACCEPTED)]
            assert await watcher.changed(MINUTE_S) == [stamp(StampKind.FINISHED)]
            assert await watcher.changed(0.0) == []

    @pytest.mark.parametrize("change", ["accept", "prefilled", "must_prefill", "drain", "set_addresses"])
    async def test_every_change_ends_the_wait(self, change: str) -> None:
        state = make_state()
        with state.watch("router") as watcher, state.accept("router", "r", 1, prefill_tokens=1, kv_tokens=1) as run:
            await watcher.changed(MINUTE_S)
            waiting = asyncio.create_task(watcher.changed(MINUTE_S))
            await asyncio.sleep(0)
            match change:
                case "accept":
                    with state.accept("other", "s", 1, prefill_tokens=1, kv_tokens=1):
                        await waiting
                case "prefilled":
                    state.prefilled(run)
                case "must_prefill":
                    state.must_prefill(run, 5)
                case "drain":
                    state.drain()
                case "set_addresses":
                    state.set_addresses("host:1", "host:2")
            assert await waiting == []

    async def test_a_wait_without_a_change_ends_at_its_time(self) -> None:
        with make_state().watch("router") as watcher:
            assert await watcher.changed(0.0) == []

    async def test_a_router_that_comes_back_early_is_not_cut_off_by_the_end_of_its_old_stream(self) -> None:
        state = make_state()
        old = state.watch("router")
        old.__enter__()
        with state.watch("router") as watcher:
            old.__exit__(None, None, None)
            with state.accept("router", "r", 1, prefill_tokens=1, kv_tokens=1):
                assert await watcher.changed(MINUTE_S) == [stamp(StampKind.ACCEPTED)]

    async def test_stamps_of_a_router_that_does_not_read_are_bounded(self) -> None:
        state = make_state()
        with state.watch("router") as watcher:
            for attempt in range(6_000):
                with state.accept("router", "r", attempt, prefill_tokens=1, kv_tokens=1):
                    pass
            stamps = await watcher.changed(MINUTE_S)
        assert len(stamps) == 10_000
        assert stamps[-1] == stamp(StampKind.FINISHED, attempt=5_999)

    async def test_nothing_is_kept_for_a_router_that_has_left(self) -> None:
        state = make_state()
        with state.watch("router"):
            pass
        with state.accept("router", "r", 1, prefill_tokens=1, kv_tokens=1):
            pass
        with state.watch("router") as watcher:
            assert await watcher.changed(0.0) == []


STEP = StepSample(prefill_tokens=0, prefill_pairs=0, decode_requests=1, kv_tokens=10, duration_s=0.002)


def test_every_watcher_is_told_of_every_measured_step_once() -> None:
    state = make_state()
    with state.watch("a") as one, state.watch("b") as other:
        state.measured([STEP])
        state.measured([replace(STEP, kv_tokens=11)])
        for watcher in (one, other):
            assert [step.kv_tokens for step in watcher.take_steps()] == [10, 11]
            assert watcher.take_steps() == ()


def test_a_watcher_that_does_not_read_keeps_the_latest_steps() -> None:
    state = make_state()
    with state.watch("a") as watcher:
        state.measured([replace(STEP, kv_tokens=number) for number in range(100)])
        steps = watcher.take_steps()
        assert (len(steps), steps[-1].kv_tokens) == (MAX_MESSAGE_STEPS, 99)
