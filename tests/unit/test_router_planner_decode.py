"""The decode worker that the planner takes, when a worker is open, and what is predicted of a request."""

from dataclasses import replace
from itertools import pairwise

import pytest

from router.config import RouterConfig
from router.estimator import kv_room_tokens
from router.placement import NO_DECODE_WORKER, Assignment
from router.policies import DEFAULT_POLICY
from tandem.domain import ReplicaId, ReplicaState, RequestId, Role, Sampling, Slo
from tests.router_parts import HANDING_OFF, RouterParts, distrust, make_tracked
from tests.samples import BLOCK_SIZE_TOKENS, make_lease

ANY = RouterConfig()


def names(assignment: Assignment) -> list[str]:
    return [lease.replica_id for lease in assignment.prefill]


class TestAlone:
    def test_a_prompt_that_no_replica_is_there_for_takes_what_it_would_on_the_last_one(self) -> None:
        parts = RouterParts("decode-0")
        own_s = parts.assign(make_tracked()).own_s
        parts.fleet.lose(ReplicaId("decode-0"), 1, 0.0)
        assert parts.planner.alone_s(make_tracked()) == pytest.approx(own_s)

    def test_of_a_model_never_seen_nothing_is_known(self) -> None:
        assert RouterParts().planner.alone_s(make_tracked()) == 0.0


class TestOpen:
    def test_a_worker_is_open_up_to_one_chunk_and_50_ms(self) -> None:
        parts = RouterParts("prefill-0")
        lease = parts.lease("prefill-0")
        limit_s = 0.05 + parts.planner.chunk_s(lease)
        assert parts.planner.chunk_s(lease) == pytest.approx(2e-3 + 2048 * 6e-5)
        parts.give("prefill-0", limit_s - 0.001)
        assert parts.planner.is_open(lease, 0.0)
        parts.give("prefill-0", 0.002, key="more")
        assert not parts.planner.is_open(lease, 0.0)
        assert parts.planner.is_open(lease, 0.01)

    def test_how_far_ahead_can_be_set(self) -> None:
        parts = RouterParts("prefill-0", config=replace(HANDING_OFF, ahead_s=0.2))
        parts.give("prefill-0", 0.3)
        assert parts.planner.is_open(parts.lease("prefill-0"), 0.0)

    def test_where_seconds_are_not_trusted_two_chunks_of_tokens_are(self) -> None:
        parts = RouterParts("prefill-0")
        distrust(parts.predictor)
        parts.give("prefill-0", 99.0, tokens=4096)
        assert parts.planner.is_open(parts.lease("prefill-0"), 0.0)
        parts.give("prefill-0", 0.0, key="more", tokens=1)
        assert not parts.planner.is_open(parts.lease("prefill-0"), 0.0)

    def test_where_seconds_are_not_trusted_what_other_routers_sent_counts_too(self) -> None:
        parts = RouterParts("prefill-0")
        distrust(parts.predictor)
        parts.report("prefill-0", pending_prefill_tokens=4097)
        assert not parts.planner.is_open(parts.lease("prefill-0"), 0.0)

    def test_a_prompt_begins_after_what_the_worker_was_given_trusted_or_not(self) -> None:
        parts = RouterParts("prefill-0")
        lease = parts.lease("prefill-0")
        parts.give("prefill-0", 0.25)
        for _ in range(2):
            assert parts.planner.starts_s(lease, 1.0) == 1.0 + parts.planner.ahead_s(lease, 1.0) > 1.0
            distrust(parts.predictor)


class TestDecodeWorker:
    def test_ties_go_to_the_lower_id(self) -> None:
        assert RouterParts("prefill-0", "decode-1", "decode-0").place(make_tracked()).decode.replica_id == "decode-0"

    def test_the_one_with_the_least_seconds_per_token_is_taken(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", "decode-1")
        parts.report("decode-0", running_requests=8, kv_tokens=4000)
        assert parts.place(make_tracked()).decode.replica_id == "decode-1"

    def test_the_hand_off_counts_for_as_much_as_the_tokens(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", "decode-1")
        parts.see(replace(parts.lease("decode-0"), node="far"))
        parts.report("decode-1", running_requests=8, kv_tokens=4000)  # slower, and on the prefill worker's node
        assert parts.place(make_tracked(expected_output_tokens=2)).decode.replica_id == "decode-1"
        assert parts.place(make_tracked(expected_output_tokens=5000)).decode.replica_id == "decode-0"

    def test_those_whose_objective_a_further_request_would_break_are_left_alone(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", "decode-1")
        parts.report("decode-1", running_requests=1, kv_tokens=100)
        assert parts.place(make_tracked()).decode.replica_id == "decode-0"
        parts.objectives.add(ReplicaId("decode-0"), 1e-6)
        assert parts.place(make_tracked()).decode.replica_id == "decode-1"

    def test_its_own_objective_counts_too_and_where_all_break_it_the_least_is_taken(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", "decode-1")
        parts.report("decode-1", running_requests=1, kv_tokens=100)
        assert parts.place(make_tracked(slo=Slo(tpot_s=1e-6))).decode.replica_id == "decode-0"

    def test_one_without_room_is_not_taken(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", "decode-1")
        parts.engine("decode-0", kv_blocks=10)
        parts.report("decode-0", running_requests=1, kv_tokens=110)
        parts.report("decode-1", running_requests=8, kv_tokens=4000)
        tracked = make_tracked(expected_output_tokens=16)
        assert parts.place(tracked).decode.replica_id == "decode-1"

    def test_one_that_runs_nothing_has_room_for_anything(self) -> None:
        parts = RouterParts("prefill-0", "decode-0")
        parts.engine("decode-0", kv_blocks=1)
        assert parts.place(make_tracked()).decode.replica_id == "decode-0"

    def test_a_full_batch_has_no_room(self) -> None:
        parts = RouterParts("prefill-0", "decode-0")
        tracked = make_tracked()
        parts.report("decode-0", running_requests=64)
        assert parts.planner.try_place(tracked, parts.assign(tracked), 0.0) is None
        parts.engine("decode-0", max_num_seqs=65)
        assert parts.planner.try_place(tracked, parts.assign(tracked), 0.0) is not None

    def test_room_is_kept_for_its_long_outputs_and_half_of_what_others_still_produce(self) -> None:
        parts = RouterParts("prefill-0", "decode-0")
        tracked = make_tracked(sampling=Sampling(max_tokens=20), expected_output_tokens=20)
        output = parts.planner.output(tracked)
        room_tokens = 0.95 * kv_room_tokens(parts.lease("decode-0"))
        fits = int(room_tokens - 192 - output.p90_tokens - 0.5 * 4 * output.mean_tokens)
        parts.report("decode-0", running_requests=4, kv_tokens=fits)
        assert parts.place(tracked).kv_tokens == fits + 192
        parts.ledger.book(ReplicaId("decode-0"), (RequestId("x"), 1), prefill_tokens=0, kv_tokens=1)
        assert parts.planner.try_place(tracked, parts.assign(tracked), 0.0) is None

    def test_one_worker_without_room_keeps_waiting_unless_its_output_has_begun(self) -> None:
        parts = RouterParts("decode-0")
        parts.report("decode-0", running_requests=64)
        tracked = make_tracked()
        assert parts.planner.try_place(tracked, parts.assign(tracked), 0.0) is None
        tracked.output_tokens = 3
        assert parts.place(tracked).decode.replica_id == "decode-0"

    def test_prefill_workers_that_take_nothing_any_more_are_no_fallback(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        tracked = make_tracked()
        assignment = parts.assign(tracked)
        assert names(assignment) == ["prefill-0", "prefill-1"]
        parts.see(make_lease("prefill-1", Role.PREFILL, state=ReplicaState.DRAINING))
        placement = parts.planner.try_place(tracked, assignment, 0.0)
        assert placement is not None
        assert [lease.replica_id for lease in placement.prefill] == ["prefill-0"]

    def test_where_the_last_decode_worker_is_gone_the_prefill_worker_does_both(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        tracked = make_tracked()
        assignment = parts.assign(tracked)
        parts.fleet.lose(ReplicaId("decode-0"), 1, 0.0)
        placement = parts.planner.try_place(tracked, assignment, 0.0)
        assert placement is not None
        assert (placement.prefill, placement.decode.replica_id) == ((), "prefill-0")
        assert placement.assignment.one_worker_reason == NO_DECODE_WORKER


class TestPredictions:
    def test_they_say_what_they_were_made_from(self) -> None:
        parts = RouterParts("prefill-0", "decode-0")
        parts.give("prefill-0", 0.04)
        parts.report("decode-0", running_requests=3, kv_tokens=500)
        placement = parts.place(make_tracked())
        assert (placement.batch_requests, placement.kv_tokens, placement.is_same_node) == (4, 692, True)
        assert placement.backlog_s == pytest.approx(0.04)
        assert placement.prefill_s.mean_s == pytest.approx(0.04 + placement.assignment.own_s)
        assert placement.tpot.mean_s == pytest.approx(2e-3 + 4 * 2e-4 + 692 * 1e-8)
        assert placement.handoff_gap is not None
        assert placement.handoff_gap.mean_s == pytest.approx(5e-3 + 6 * 1e-4)
        steps = placement.output.mean_tokens - 2
        assert placement.e2e.mean_s == pytest.approx(
            placement.assignment.ttft.mean_s + placement.handoff_gap.mean_s + steps * placement.tpot.mean_s
        )

    def test_a_hand_off_to_another_node_takes_longer(self) -> None:
        parts = RouterParts("prefill-0", "decode-0")
        near = parts.place(make_tracked())
        parts.see(make_lease("decode-0", node="node-1"))
        far = parts.place(make_tracked())
        assert not far.is_same_node
        assert near.handoff_gap is not None
        assert far.handoff_gap is not None
        assert far.handoff_gap.mean_s > near.handoff_gap.mean_s

    def test_one_worker_has_no_gap(self) -> None:
        assert RouterParts("decode-0").place(make_tracked()).handoff_gap is None

    def test_resumed_and_sent_tokens_are_no_output_still_to_come(self) -> None:
        parts = RouterParts("decode-0")
        tracked = make_tracked(resume_token_ids=(1,) * 4, sampling=Sampling(max_tokens=16))
        tracked.output_tokens = 5
        assert parts.planner.output(tracked).p90_tokens <= 7

    def test_more_work_ahead_never_makes_the_first_token_sooner(self) -> None:
        ttft_s = []
        for work_s in (0.0, 0.1, 0.2, 1.0, 5.0):
            parts = RouterParts("prefill-0", "decode-0")
            parts.give("prefill-0", work_s)
            ttft_s.append(parts.assign(make_tracked()).ttft.mean_s)
        assert all(sooner < later for sooner, later in pairwise(ttft_s))

    def test_room_is_in_whole_blocks(self) -> None:
        assert kv_room_tokens(make_lease()) == 1000 * BLOCK_SIZE_TOKENS

    def test_the_default_policy_is_named(self) -> None:
        assert RouterParts("decode-0").assign(make_tracked()).policy == DEFAULT_POLICY
