"""Conversations with the core about waiting: who goes when, who is told at once to come back later, and where a line goes.

A prompt of 2,048 tokens is one chunk and is predicted to take 127 ms; a prefill worker may have 175 ms of work.
"""

from dataclasses import replace
from typing import Any

import pytest

from router.config import QueueOrder, RouterConfig
from router.core import RouterCore
from router.instructions import Dispatch, Instruction, Reject
from router.interval import Interval, PredictionKind
from router.pool_times import PoolKey
from tandem.domain import ModelId, Receipt, ReplicaId, ReplicaState, RequestId, Role, Slo
from tandem.errors import OverloadedError, Reason
from tandem.step_sample import StepSample
from tests.core_talk import HANDING_OFF, LOST, R1, R2, R3, make_core, only_dispatch, only_reject, predicted_work, submit
from tests.router_parts import distrust
from tests.samples import ENGINE, make_lease

CHUNK = 2048
OWN_S = 2e-3 + CHUNK * 6e-5 + CHUNK**2 / 2 * 1e-9
M = ModelId("m")


def dispatched(instructions: list[Instruction]) -> list[str]:
    assert all(isinstance(one, Dispatch) for one in instructions)
    return [str(one.request_id) for one in instructions]


def fill(core: RouterCore, requests: int, now_s: float = 0.0) -> list[str]:
    """So many prompts of one chunk; answers who was dispatched at once."""
    gone = []
    for number in range(1, requests + 1):
        gone += dispatched(submit(core, f"r{number}", now_s, prompt_tokens=CHUNK))
    return gone


def ended(core: RouterCore, request_id: RequestId, now_s: float) -> list[Instruction]:
    core.tokens(request_id, 1, 1, now_s)
    instructions = core.finished(request_id, 1, Receipt(request_id=request_id), now_s)
    core.check_invariants()
    return instructions


class TestRethinking:
    def test_a_short_prompt_does_not_wait_beside_an_idle_worker(self) -> None:
        core = make_core(replicas=())
        engine = replace(ENGINE, max_num_seqs=1)
        for name in ("prefill-0", "decode-0", "decode-1"):
            core.replica_seen(make_lease(name, Role(name.split("-")[0]), engine=engine), 0.0)
        gone = [name for number in (1, 2, 3) for name in dispatched(submit(core, f"r{number}", prompt_tokens=10))]
        assert gone == ["r1", "r2"]
        ended(core, R2, 1.0)
        assert dispatched(core.tick(3.0)) == ["r3"]
        core.check_invariants()


class TestAhead:
    def test_a_worker_is_given_one_chunk_ahead_and_the_rest_waits_here(self) -> None:
        core = make_core()
        assert fill(core, 4) == ["r1", "r2"]
        assert (core.queued_requests, core.running_requests) == (2, 2)
        assert predicted_work(core)["prefill-0"] == pytest.approx(4 * OWN_S)

    def test_the_next_goes_with_the_first_token_of_one_before(self) -> None:
        core = make_core()
        fill(core, 4)
        assert dispatched(core.tokens(R1, 1, 1, 0.06)) == ["r3"]
        assert core.tokens(R1, 1, 1, 0.06) == []
        assert dispatched(core.tokens(R2, 1, 1, 0.07)) == ["r4"]

    def test_the_next_goes_with_the_end_of_one_before(self) -> None:
        core = make_core()
        fill(core, 3)
        assert dispatched(core.cancelled(R1, 0.01)) == ["r3"]

    def test_the_next_goes_when_so_much_has_been_computed_as_predicted(self) -> None:
        core = make_core()
        fill(core, 3)
        assert core.tick(0.05) == []
        assert dispatched(core.tick(0.1)) == ["r3"]

    def test_where_seconds_are_not_trusted_two_chunks_go_ahead_by_their_tokens(self) -> None:
        core = make_core()
        distrust(core.predictor)
        assert fill(core, 4) == ["r1", "r2", "r3"]

    def test_a_request_that_goes_on_after_tokens_is_not_held_back(self) -> None:
        core = make_core(replicas=("decode-0", "decode-1"))
        assert submit(core, "long", prompt_tokens=8 * CHUNK) != []
        assert submit(core, "begun", resume_token_ids=(1, 2)) != []
        assert submit(core, "new", prompt_tokens=8 * CHUNK) != []
        assert submit(core, "waits") == []
        assert dispatched(submit(core, "further", resume_token_ids=(1, 2), is_begun=True)) == ["further"]


class TestOrder:
    def test_class_and_latest_start_decide_who_is_next(self) -> None:
        core = make_core()
        fill(core, 2)
        submit(core, "patient", prompt_tokens=CHUNK, slo=Slo(ttft_s=9.0))
        submit(core, "urgent", prompt_tokens=CHUNK, slo=Slo(ttft_s=2.0))
        submit(core, "lower", prompt_tokens=CHUNK, slo=Slo(ttft_s=0.5), priority=1)
        assert dispatched(core.tokens(R1, 1, 1, 0.1)) == ["urgent"]
        assert dispatched(core.tokens(R2, 1, 1, 0.2)) == ["patient"]
        assert dispatched(core.tokens(RequestId("urgent"), 1, 1, 0.3)) == ["lower"]

    def test_who_is_late_lets_those_go_first_who_are_not(self) -> None:
        core = make_core()
        fill(core, 2)
        submit(core, "late", prompt_tokens=CHUNK, slo=Slo(ttft_s=0.5))
        submit(core, "soon", prompt_tokens=CHUNK, slo=Slo(ttft_s=5.0))
        assert dispatched(core.tokens(R1, 1, 1, 1.0)) == ["soon"]

    def test_the_shortest_can_go_first(self) -> None:
        core = make_core(config=replace(HANDING_OFF, queue_order=QueueOrder.SHORTEST))
        fill(core, 2)
        submit(core, "long", prompt_tokens=2 * CHUNK)
        submit(core, "short", prompt_tokens=CHUNK)
        assert dispatched(core.tokens(R1, 1, 1, 0.1)) == ["short"]


class TestSlots:
    CONFIG = RouterConfig(one_worker_max_tokens=0, max_running_requests=1)

    def test_a_slot_goes_to_the_most_urgent_first_of_all_lines(self) -> None:
        core = make_core(replicas=("prefill-0", "prefill-1", "decode-0"), config=self.CONFIG)
        assert dispatched(submit(core)) == ["r1"]
        assert submit(core, "r2", slo=Slo(ttft_s=8.0)) == []
        assert submit(core, "r3", slo=Slo(ttft_s=5.0)) == []
        assert dispatched(ended(core, R1, 0.1)) == ["r3"]
        assert dispatched(ended(core, R3, 0.2)) == ["r2"]

    def test_work_that_waits_for_a_slot_is_predicted_as_queue(self) -> None:
        core = make_core(config=self.CONFIG)
        submit(core)
        submit(core, "r2", prompt_tokens=CHUNK)
        submit(core, "r3", prompt_tokens=CHUNK)
        core.cancelled(R1, 0.0)
        last = only_dispatch(core.cancelled(R2, 0.0))
        assert {term.name: term.predicted for term in last.plan.predicted}["queue_s"] == pytest.approx(OWN_S)


class TestDecodeRoom:
    def test_a_line_waits_for_a_decode_worker_with_room_and_goes_when_there_is(self) -> None:
        core = make_core(replicas=("prefill-0",))
        core.replica_seen(make_lease("decode-0", engine=replace(ENGINE, max_num_seqs=1)), 0.0)
        assert dispatched(submit(core)) == ["r1"]
        core.tokens(R1, 1, 1, 0.1)
        assert submit(core, "r2", 0.1) == []
        assert core.tick(0.2) == []
        assert dispatched(core.finished(R1, 1, Receipt(request_id=R1), 0.3)) == ["r2"]

    def test_a_new_decode_worker_has_room(self) -> None:
        core = make_core(replicas=("prefill-0",))
        core.replica_seen(make_lease("decode-0", engine=replace(ENGINE, max_num_seqs=1)), 0.0)
        submit(core)
        assert submit(core, "r2", 0.1) == []
        dispatch = only_dispatch(core.replica_seen(make_lease("decode-1"), 0.2))
        assert dispatch.plan.decode.replica_id == "decode-1"

    def test_where_the_last_decode_worker_is_lost_the_line_goes_on_at_its_prefill_worker(self) -> None:
        core = make_core()
        fill(core, 3)
        core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
        for request_id in (R1, R2):
            core.cancelled(request_id, 0.2)
        core.check_invariants()
        assert core.queued_requests == 0
        assert core.running_requests == 1


class TestLostWorkers:
    def test_the_line_of_a_lost_worker_goes_to_others(self) -> None:
        core = make_core()
        fill(core, 4)
        core.replica_seen(make_lease("prefill-1", Role.PREFILL), 0.0)
        core.replica_lost(ReplicaId("prefill-0"), 1, 0.0)
        core.check_invariants()
        assert dispatched(core.tick(0.05)) == ["r3", "r4"]
        assert core.queued_requests == 0

    def test_the_line_of_a_draining_worker_goes_to_others(self) -> None:
        core = make_core()
        fill(core, 4)
        core.replica_seen(make_lease("prefill-1", Role.PREFILL), 0.0)
        core.replica_seen(make_lease("prefill-0", Role.PREFILL, state=ReplicaState.DRAINING), 0.0)
        core.check_invariants()
        assert dispatched(core.tick(0.05)) == ["r3", "r4"]

    def test_without_another_it_waits_for_one_and_goes_when_it_comes(self) -> None:
        core = make_core(replicas=("decode-0",))
        fill(core, 3)
        core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
        core.check_invariants()
        assert core.queued_requests == 1
        assert core.tick(0.05) == []
        assert dispatched(core.replica_seen(make_lease("decode-1"), 1.0)) == ["r3"]

    def test_a_restarted_worker_takes_its_line_again(self) -> None:
        core = make_core(replicas=("decode-0",))
        fill(core, 3)
        instructions = core.replica_seen(make_lease("decode-0", incarnation=2), 0.1)
        core.check_invariants()
        assert [type(one).__name__ for one in instructions] == ["Abandon", "Abandon", "Dispatch"]
        assert instructions[-1].request_id == R3


class TestRefusal:
    """Hopeless waits are refused at once, with when to come back."""

    def busy(self, requests: int = 12) -> RouterCore:
        core = make_core(replicas=("prefill-0", "decode-0"))
        fill(core, requests)
        return core

    def test_a_sheddable_request_that_is_predicted_too_late_is_refused(self) -> None:
        core = self.busy()
        error = only_reject(submit(core, "s", prompt_tokens=CHUNK, sheddable=True, slo=Slo(ttft_s=1.0))).error
        assert isinstance(error, OverloadedError)
        assert error.reason is Reason.PREDICTED_LATE
        assert error.retry_after_s == pytest.approx(13 * OWN_S - 1.0, rel=0.05)
        assert "too late" in error.message

    def test_an_idle_cluster_refuses_nobody_whatever_it_predicts(self) -> None:
        core = make_core(replicas=("prefill-0", "decode-0"))
        for _ in range(64):
            core.predictor.observe_dispatch(M, 12.0)  # learnt in a bad hour: only what is dispatched can show that it is over
        only_dispatch(submit(core, "s", prompt_tokens=CHUNK, sheddable=True, slo=Slo(ttft_s=1e-3)))
        core.cancelled(RequestId("s"), 0.0)
        only_dispatch(submit(core, "d", prompt_tokens=CHUNK, deadline_s=5.0))

    def test_others_wait_where_a_sheddable_one_is_refused(self) -> None:
        assert submit(self.busy(), "s", prompt_tokens=CHUNK, slo=Slo(ttft_s=1.0)) == []

    def test_a_sheddable_request_that_states_no_objective_is_measured_by_the_default(self) -> None:
        core = make_core(config=replace(HANDING_OFF, default_ttft_s=1.0))
        fill(core, 12)
        only_reject(submit(core, "s", prompt_tokens=CHUNK, sheddable=True))

    def test_a_sheddable_request_that_will_be_in_time_waits(self) -> None:
        assert submit(self.busy(), "s", prompt_tokens=CHUNK, sheddable=True, slo=Slo(ttft_s=3.0)) == []

    def test_a_deadline_that_only_an_idle_cluster_would_keep_is_refused(self) -> None:
        core = self.busy()
        error = only_reject(submit(core, "d", prompt_tokens=CHUNK, deadline_s=1.0)).error
        assert error.reason is Reason.PREDICTED_LATE
        assert error.retryable
        assert submit(core, "e", prompt_tokens=CHUNK, deadline_s=3.0) == []

    def test_a_deadline_that_not_even_an_idle_cluster_would_keep_is_not_refused_for_others(self) -> None:
        assert submit(self.busy(), "d", prompt_tokens=CHUNK, deadline_s=0.9 * OWN_S) == []

    def test_those_who_come_first_go_before_and_so_do_not_count(self) -> None:
        assert submit(self.busy(), "d", prompt_tokens=CHUNK, deadline_s=1.0, priority=-1) == []

    @pytest.mark.parametrize("changes", [{"sheddable": True, "slo": Slo(ttft_s=3.0)}, {"deadline_s": 3.0}], ids=["sheddable", "deadline"])
    def test_where_predictions_are_not_trusted_their_upper_quantile_decides(self, changes: dict[str, Any]) -> None:
        core = self.busy()
        distrust(core.predictor)
        for _ in range(64):  # all take twice as long as predicted
            core.predictor.observe(PredictionKind.TTFT, M, Interval(1.0, 1.5), 2.0, 0.0)
        error = only_reject(submit(core, "s", prompt_tokens=CHUNK, **changes)).error
        assert error.reason is Reason.PREDICTED_LATE
        assert error.retry_after_s == pytest.approx(2 * 13 * OWN_S - 3.0, rel=0.05)
        assert not any(isinstance(one, Reject) for one in submit(core, "t", prompt_tokens=CHUNK, sheddable=True, slo=Slo(ttft_s=6.0)))

    def test_an_idle_cluster_refuses_nobody_by_predictions_that_are_not_trusted(self) -> None:
        core = make_core(replicas=("prefill-0", "decode-0"))
        distrust(core.predictor)
        only_dispatch(submit(core, "s", prompt_tokens=CHUNK, sheddable=True, slo=Slo(ttft_s=1e-3)))

    def test_a_further_part_of_what_has_begun_is_not_refused(self) -> None:
        core = self.busy()
        instructions = submit(core, "b", prompt_tokens=CHUNK, sheddable=True, slo=Slo(ttft_s=0.1), is_begun=True)
        assert all(isinstance(one, Dispatch) for one in instructions)

    def test_a_second_look_is_taken_when_the_turn_comes(self) -> None:
        core = self.busy(2)
        assert submit(core, "s", prompt_tokens=CHUNK, sheddable=True, slo=Slo(ttft_s=1.0)) == []
        assert submit(core, "n", prompt_tokens=CHUNK, slo=Slo(ttft_s=1.0)) == []
        reject, dispatch = core.tokens(R1, 1, 1, 5.0)
        core.check_invariants()
        assert reject.request_id == "s"
        error = only_reject([reject]).error
        assert (error.reason, error.retryable) == (Reason.PREDICTED_LATE, True)
        assert dispatch.request_id == "n"

    def test_the_second_look_too_is_taken_by_trusted_predictions_only(self) -> None:
        core = self.busy(2)
        submit(core, "s", prompt_tokens=CHUNK, sheddable=True, slo=Slo(ttft_s=1.0))
        distrust(core.predictor)
        assert dispatched(core.tokens(R1, 1, 1, 5.0)) == ["s"]

    def test_what_has_begun_is_not_shed(self) -> None:
        core = make_core(replicas=("decode-0",))
        submit(core, "s", sheddable=True, slo=Slo(ttft_s=1.0))
        core.tokens(RequestId("s"), 1, 3, 0.5)
        assert core.failed(RequestId("s"), 1, LOST, 5.0) == []
        assert dispatched(core.tick(5.5)) == ["s"]


class TestDrainRate:
    def queue_s(self, core: RouterCore, now_s: float) -> float:
        return core.predictor.queue_s("m", ahead_s=1.0, replicas=1, now_s=now_s)

    def test_a_queue_that_is_given_up_does_not_stand_still_for_ever(self) -> None:
        core = make_core()
        fill(core, 4)
        core.tokens(R1, 1, 1, 0.1)
        core.cancelled(RequestId("r4"), 0.1)
        assert core.queued_requests == 0
        assert self.queue_s(core, 9.0) == pytest.approx(1.0, rel=0.1)

    def test_a_queue_that_stands_still_counts_from_its_beginning(self) -> None:
        core = make_core()
        fill(core, 3)
        assert self.queue_s(core, 2.0) > 2.0

    def test_a_refused_request_that_was_the_last_leaves_no_queue(self) -> None:
        core = make_core()
        fill(core, 2)
        submit(core, "d", prompt_tokens=CHUNK, deadline_s=0.05)
        only_reject(core.tick(0.05))
        assert core.queued_requests == 0
        assert self.queue_s(core, 9.0) == pytest.approx(1.0, rel=0.1)

    def test_waiting_for_a_first_replica_says_nothing_of_how_fast_the_queue_moves(self) -> None:
        core = make_core(replicas=("decode-0",))
        core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
        submit(core)
        assert self.queue_s(core, 4.0) == pytest.approx(1.0)
        only_dispatch(core.replica_seen(make_lease("decode-1"), 4.0))
        assert self.queue_s(core, 4.0) == pytest.approx(1.0)


def test_a_caller_refused_now_may_come_back_when_the_queue_has_passed() -> None:
    core = make_core()
    assert core.retry_after_s(M, 0.0) == pytest.approx(0.1)
    fill(core, 12)
    assert core.retry_after_s(M, 0.0) == pytest.approx(10 * OWN_S / 2, rel=0.01)  # two replicas, as nothing is known yet


def test_a_policy_is_chosen_by_name() -> None:
    core = make_core(replicas=("prefill-0", "prefill-1", "decode-0"), config=RouterConfig(policy="round_robin"))
    chosen = [only_dispatch(submit(core, f"r{number}")).plan.prefill[0].replica_id for number in range(4)]
    assert chosen == ["prefill-0", "prefill-1", "prefill-0", "prefill-1"]


def test_where_it_is_quicker_one_worker_does_both_up_to_the_cap() -> None:
    reasons = []
    for most_tokens in (None, 100, 99, 0):
        core = make_core(config=RouterConfig(one_worker_max_tokens=most_tokens))
        reasons.append(only_dispatch(submit(core)).plan.one_worker_reason)
    assert reasons == ["one_worker_quicker", "one_worker_quicker", "", ""]


def test_the_work_of_one_worker_is_booked_where_it_is_done() -> None:
    core = make_core(config=RouterConfig())
    only_dispatch(submit(core))
    work = predicted_work(core)
    assert work["decode-0"] > 0.0
    assert work["prefill-0"] == 0.0
    core.tokens(R1, 1, 1, 0.1)
    assert predicted_work(core)["decode-0"] == 0.0


class TestLineRate:
    """One worker takes a chunk of a second after the other, at half the speed that its steps promise."""

    PROMISED_S, TRUE_S = 1.0, 2.0

    def loaded(self) -> RouterCore:
        core = make_core()
        step = StepSample(prefill_tokens=CHUNK, prefill_pairs=CHUNK**2 // 2, decode_requests=0, kv_tokens=0, duration_s=self.PROMISED_S)
        for replica_id in ("prefill-0", "decode-0"):
            core.steps(ReplicaId(replica_id), 1, [step] * 200, 0.0)
        fill(core, 12)
        return core

    def line_s(self, core: RouterCore, now_s: float) -> float:
        return core.predictor.line_s(PoolKey(M, "cpu", Role.PREFILL), ahead_s=1.0, now_s=now_s)

    def test_a_line_is_predicted_as_fast_as_it_moves_whatever_filled_the_worker_at_first(self) -> None:
        core = self.loaded()
        assert self.line_s(core, 0.0) == pytest.approx(1.0)
        for number in range(1, 8):
            core.tokens(RequestId(f"r{number}"), 1, 1, number * self.TRUE_S)
            core.check_invariants()
        assert self.line_s(core, 14.0) == pytest.approx(self.TRUE_S / self.PROMISED_S, rel=0.1)
