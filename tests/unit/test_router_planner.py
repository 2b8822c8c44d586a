"""The planner takes the least predicted seconds, and says why where one worker does both."""

from dataclasses import replace
from random import Random

import pytest

from router.config import RouterConfig
from router.estimator import pool_of
from router.placement import NO_DECODE_WORKER, NO_PREFILL_WORKER, QUICKER, SHORT_PROMPT, Assignment
from router.policies import POLICIES
from tandem.domain import ReplicaId, ReplicaState, Role, Sampling
from tests.router_parts import HANDING_OFF, RouterParts, distrust, make_tracked
from tests.samples import make_lease
from tests.step_profiles import h200_s, prompts, sample

ANY = RouterConfig()


def names(assignment: Assignment) -> list[str]:
    return [lease.replica_id for lease in assignment.prefill]


class TestPrefillWorker:
    def test_ties_go_to_the_lower_id(self) -> None:
        assignment = RouterParts("prefill-1", "prefill-0", "decode-0").assign(make_tracked())
        assert names(assignment) == ["prefill-0", "prefill-1"]
        assert assignment.worker.replica_id == "prefill-0"

    def test_they_are_ranked_by_the_seconds_ahead_and_cut_to_three(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "prefill-2", "prefill-3", "decode-0")
        for name, work_s in (("prefill-0", 0.9), ("prefill-1", 0.3), ("prefill-2", 0.6)):
            parts.give(name, work_s)
        assignment = parts.assign(make_tracked())
        assert names(assignment) == ["prefill-3", "prefill-1", "prefill-2"]
        assert [one.lease.replica_id for one in assignment.considered] == ["prefill-3", "prefill-1", "prefill-2", "prefill-0"]

    def test_time_that_passes_shortens_the_work_ahead(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        parts.give("prefill-0", 1.0)
        parts.give("prefill-1", 0.8, now_s=0.5)
        assert names(parts.assign(make_tracked(), 0.5)) == ["prefill-0", "prefill-1"]

    def test_the_work_of_other_routers_counts(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        parts.report("prefill-0", pending_prefill_tokens=5000)
        assert names(parts.assign(make_tracked())) == ["prefill-1", "prefill-0"]
        assert parts.planner.ahead_s(parts.lease("prefill-0"), 0.0) == pytest.approx(3 * 2e-3 + 5000 * 6e-5)

    def test_a_slow_replica_is_behind_a_quick_one(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        pool, rng = pool_of(parts.lease("prefill-0")), Random(1)
        for second in range(200):
            for replica_id, slowdown in (("prefill-0", 2.0), ("prefill-1", 1.0)):
                parts.predictor.pools.observe(pool, replica_id, [sample(h200_s, prompts, rng, slowdown=slowdown)], float(second))
        assert names(parts.assign(make_tracked())) == ["prefill-1", "prefill-0"]
        slow, quick = parts.lease("prefill-0"), parts.lease("prefill-1")
        assert parts.planner.chunk_s(slow) == pytest.approx(2 * parts.planner.chunk_s(quick), rel=0.1)
        for name in ("prefill-0", "prefill-1"):
            parts.report(name, pending_prefill_tokens=2048)
        assert parts.planner.ahead_s(slow, 0.0) == pytest.approx(2 * parts.planner.ahead_s(quick, 0.0), rel=0.1)

    def test_those_who_wait_there_and_go_first_count_and_those_who_go_after_do_not(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        waits = make_tracked("r9")
        parts.turns().line_up(waits, parts.assign(waits), 0.0)
        assert parts.assign(make_tracked()).worker.replica_id == "prefill-1"
        assert parts.assign(make_tracked(priority=1)).worker.replica_id == "prefill-1"
        assert parts.assign(make_tracked(priority=-1)).worker.replica_id == "prefill-0"

    def test_cached_blocks_outweigh_a_shorter_backlog(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        parts.give("prefill-1", 0.005)
        parts.hold("prefill-1", 5)
        assignment = parts.assign(make_tracked())
        assert names(assignment) == ["prefill-1", "prefill-0"]
        assert (assignment.cached_tokens, assignment.uncached_tokens) == (160, 32)

    def test_a_long_backlog_outweighs_cached_blocks(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        parts.give("prefill-1", 0.5)
        parts.hold("prefill-1", 6)
        assert parts.assign(make_tracked()).worker.replica_id == "prefill-0"

    def test_a_wholly_cached_prompt_still_computes_its_last_token(self) -> None:
        parts = RouterParts("prefill-0", "decode-0")
        parts.hold("prefill-0", 6)
        assignment = parts.assign(make_tracked())
        assert (assignment.cached_tokens, assignment.uncached_tokens) == (191, 1)

    def test_blocks_of_an_older_incarnation_are_not_cached(self) -> None:
        parts = RouterParts("prefill-0", "decode-0")
        parts.hold("prefill-0", 6)
        parts.see(make_lease("prefill-0", Role.PREFILL, 2))
        assert parts.assign(make_tracked()).cached_tokens == 0

    def test_without_workers_there_is_none(self) -> None:
        assert RouterParts().planner.try_assign(make_tracked(), 0.0) is None

    def test_the_prediction_adds_up(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        for name in ("prefill-0", "prefill-1"):
            parts.give(name, 1.0)
        assignment = parts.assign(make_tracked())
        at_worker_s = 0.05 + parts.planner.chunk_s(assignment.worker)
        assert assignment.queue.mean_s == pytest.approx(1.0 - at_worker_s)  # two replicas drain twice as much
        assert assignment.ttft.mean_s == pytest.approx(1.0 + assignment.own_s)
        assert assignment.considered[0].total_s == pytest.approx(1.0 + assignment.own_s)

    def test_work_that_waits_for_a_slot_before_it_counts_where_it_is_longer(self) -> None:
        parts = RouterParts("prefill-0", "decode-0")
        tracked = make_tracked()
        tracked.slots_ahead_s = 4.0
        assert parts.assign(tracked).queue.mean_s == pytest.approx(4.0)


class TestOneWorker:
    def test_a_short_prompt_goes_to_one_worker(self) -> None:
        parts = RouterParts("prefill-0", "decode-0")
        short, long_enough = parts.assign(make_tracked(prompt_tokens=63)), parts.assign(make_tracked(prompt_tokens=64))
        assert (names(short), short.worker.replica_id, short.one_worker_reason) == ([], "decode-0", SHORT_PROMPT)
        assert (names(long_enough), long_enough.one_worker_reason) == (["prefill-0"], "")

    def test_how_short_can_be_set(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", config=replace(HANDING_OFF, handoff_min_tokens=300))
        assert parts.assign(make_tracked()).one_worker_reason == SHORT_PROMPT

    def test_what_cannot_be_handed_off_exactly_goes_to_one_worker(self) -> None:
        assignment = RouterParts("prefill-0", "decode-0").assign(make_tracked(sampling=Sampling(n=2)))
        assert (names(assignment), assignment.worker.replica_id, assignment.one_worker_reason) == ([], "decode-0", "n")

    def test_without_prefill_workers_a_decode_worker_does_both(self) -> None:
        assignment = RouterParts("decode-0").assign(make_tracked())
        assert (names(assignment), assignment.worker.replica_id, assignment.one_worker_reason) == ([], "decode-0", NO_PREFILL_WORKER)

    def test_without_decode_workers_a_prefill_worker_does_both(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1")
        parts.give("prefill-0", 0.5)
        assignment = parts.assign(make_tracked(sampling=Sampling(n=2)))
        assert (names(assignment), assignment.worker.replica_id, assignment.one_worker_reason) == ([], "prefill-1", NO_DECODE_WORKER)

    @pytest.mark.parametrize(("output_tokens", "name"), [(1, "decode-1"), (500, "decode-0")])
    def test_it_is_chosen_by_prefill_and_decode_together(self, output_tokens: int, name: str) -> None:
        parts = RouterParts("decode-0", "decode-1")
        parts.report("decode-1", running_requests=2, kv_tokens=400)
        parts.hold("decode-1", 5)
        tracked = make_tracked(sampling=Sampling(max_tokens=output_tokens), expected_output_tokens=output_tokens)
        assert parts.assign(tracked).worker.replica_id == name

    def test_one_without_room_is_the_last_choice(self) -> None:
        parts = RouterParts("decode-0", "decode-1")
        parts.engine("decode-0", kv_blocks=6)
        parts.report("decode-0", running_requests=1)
        parts.give("decode-1", 5.0)
        assert parts.assign(make_tracked()).worker.replica_id == "decode-1"


class TestQuicker:
    def test_an_idle_decode_worker_is_quicker_than_a_busy_prefill_worker_and_a_hand_off(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", config=ANY)
        parts.give("prefill-0", 0.5)
        assignment = parts.assign(make_tracked())
        assert (names(assignment), assignment.worker.replica_id, assignment.one_worker_reason) == ([], "decode-0", QUICKER)
        assert assignment.considered[0].is_one_worker
        assert [one.lease.replica_id for one in assignment.considered] == ["decode-0", "prefill-0"]

    def test_the_hand_off_alone_decides_between_idle_workers(self) -> None:
        assert RouterParts("prefill-0", "decode-0", config=ANY).assign(make_tracked()).one_worker_reason == QUICKER

    def test_it_is_not_where_its_prompt_would_delay_many(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", config=ANY)
        parts.report("decode-0", running_requests=20, kv_tokens=2000)
        assert names(parts.assign(make_tracked())) == ["prefill-0"]

    def test_blocks_that_it_holds_count(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", "decode-1", config=ANY)
        parts.hold("decode-1", 6)
        assignment = parts.assign(make_tracked())
        assert (assignment.worker.replica_id, assignment.cached_tokens, assignment.one_worker_reason) == ("decode-1", 191, QUICKER)

    def test_it_is_not_where_it_has_no_room(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", config=ANY)
        parts.engine("decode-0", max_num_seqs=1)
        parts.give("prefill-0", 0.5)
        parts.report("decode-0", running_requests=1, kv_tokens=10)
        assert names(parts.assign(make_tracked())) == ["prefill-0"]

    @pytest.mark.parametrize(("most_tokens", "cached_blocks", "reason"), [(192, 0, QUICKER), (191, 0, ""), (96, 3, QUICKER), (95, 3, "")])
    def test_its_cap_is_on_the_tokens_to_compute(self, most_tokens: int, cached_blocks: int, reason: str) -> None:
        parts = RouterParts("prefill-0", "decode-0", config=replace(ANY, one_worker_max_tokens=most_tokens))
        parts.hold("prefill-0", cached_blocks)
        parts.hold("decode-0", cached_blocks)
        assert parts.assign(make_tracked()).one_worker_reason == reason


class TestPolicies:
    @pytest.mark.parametrize("policy", sorted(POLICIES))
    def test_every_one_can_be_named_and_ranks_the_workers(self, policy: str) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0", config=replace(HANDING_OFF, policy=policy))
        assignment = parts.assign(make_tracked())
        assert assignment.policy == policy
        assert set(names(assignment)) <= {"prefill-0", "prefill-1"}
        assert assignment.worker == assignment.prefill[0]

    def test_round_robin_takes_turns(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0", config=replace(HANDING_OFF, policy="round_robin"))
        parts.give("prefill-1", 9.0)
        assert [parts.assign(make_tracked()).worker.replica_id for _ in range(3)] == ["prefill-0", "prefill-1", "prefill-0"]

    def test_the_others_never_keep_a_long_prompt_on_one_worker(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", config=replace(ANY, policy="round_robin"))
        parts.give("prefill-0", 9.0)
        assert names(parts.assign(make_tracked())) == ["prefill-0"]

    def test_where_predictions_are_not_trusted_tokens_times_requests_decide(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0", config=ANY)
        distrust(parts.predictor)
        parts.report("prefill-0", pending_prefill_tokens=100, running_requests=1)
        parts.give("prefill-1", 100.0, tokens=10)  # seconds that nobody believes
        assignment = parts.assign(make_tracked())
        assert (names(assignment), assignment.policy) == (["prefill-1", "prefill-0"], "lmetric")

    def test_those_who_wait_are_seen_by_it(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0", config=replace(HANDING_OFF, policy="least_requests"))
        turns = parts.turns()
        for number in range(3):
            tracked = make_tracked(f"w{number}")
            turns.line_up(tracked, parts.assign(tracked), 0.0)
        assert {name: len(line) for name, line in parts.lines.items()} == {"prefill-0": 2, "prefill-1": 1}

    def test_seconds_of_a_prompt_are_those_of_the_pool(self) -> None:
        parts = RouterParts("prefill-0", "decode-0", config=replace(HANDING_OFF, policy="preble_e2"))
        assert parts.assign(make_tracked()).policy == "preble_e2"


class TestMany:
    def make(self, prefill: int, decode: int, config: RouterConfig = HANDING_OFF) -> RouterParts:
        return RouterParts(*(f"prefill-{n:03}" for n in range(prefill)), *(f"decode-{n:03}" for n in range(decode)), config=config)

    def test_above_64_the_best_holder_the_idlest_and_two_at_random_are_looked_at(self) -> None:
        parts = self.make(65, 1)
        for number in range(65):
            parts.give(f"prefill-{number:03}", 5.0 if number != 40 else 0.001)
        parts.hold("prefill-007", 2)
        parts.hold("prefill-050", 5)
        considered = parts.assign(make_tracked()).considered
        looked_at = {one.lease.replica_id for one in considered}
        assert {"prefill-050", "prefill-040"} <= looked_at
        assert len(looked_at) == len(considered) <= 4
        assert parts.assign(make_tracked()).worker.replica_id == "prefill-040"

    def test_of_holders_of_as_much_the_one_with_the_lower_id_is_looked_at(self) -> None:
        parts = self.make(65, 1)
        for name, blocks in (("prefill-050", 5), ("prefill-007", 2), ("prefill-060", 5), ("prefill-030", 5)):
            parts.hold(name, blocks)
        considered = parts.assign(make_tracked()).considered
        assert considered[0].lease.replica_id == "prefill-030"

    def test_without_a_holder_the_idlest_and_two_at_random_are(self) -> None:
        parts = self.make(65, 1)
        assert len(parts.assign(make_tracked()).considered) <= 3
        parts.hold("decode-000", 5)
        assert len(parts.assign(make_tracked()).considered) <= 3

    def test_up_to_64_all_are(self) -> None:
        assert len(self.make(64, 1).assign(make_tracked()).considered) == 64

    def test_one_that_is_gone_is_not_among_them(self) -> None:
        parts = self.make(66, 1)
        for number in range(66):
            parts.give(f"prefill-{number:03}", 5.0 if number != 40 else 0.001)
        assert parts.assign(make_tracked()).worker.replica_id == "prefill-040"
        parts.fleet.lose(ReplicaId("prefill-040"), 1, 0.0)
        parts.planner.note_load(ReplicaId("prefill-040"))
        considered = parts.assign(make_tracked()).considered
        assert "prefill-040" not in {one.lease.replica_id for one in considered}

    def test_changes_that_nobody_reads_are_taken_in_before_they_are_too_many(self) -> None:
        parts = self.make(2, 1)
        for number in range(5000):
            parts.planner.note_load(ReplicaId(f"gone-{number}"))
        assert names(parts.assign(make_tracked())) == ["prefill-000", "prefill-001"]

    def test_of_decode_workers_the_idlest_and_two_at_random_are(self) -> None:
        parts = self.make(1, 65)
        for number in range(65):
            if number != 33:
                parts.report(f"decode-{number:03}", running_requests=9, kv_tokens=900)
        assert {parts.place(make_tracked()).decode.replica_id for _ in range(20)} == {"decode-033"}

    def test_the_same_seed_chooses_the_same(self) -> None:
        runs = [[parts.assign(make_tracked()).worker.replica_id for _ in range(9)] for parts in (self.make(65, 1), self.make(65, 1))]
        assert runs[0] == runs[1]

    def test_the_idlest_that_takes_nothing_more_is_not_looked_at(self) -> None:
        parts = self.make(67, 1)
        for number in range(65):
            parts.give(f"prefill-{number:03}", 5.0)
        assert parts.assign(make_tracked()).worker.replica_id == "prefill-065"
        parts.see(replace(parts.lease("prefill-065"), state=ReplicaState.DRAINING))
        assert parts.fleet.lose(ReplicaId("prefill-066"), 1, 0.0)
        parts.planner.note_load(ReplicaId("prefill-066"))
        assert parts.assign(make_tracked()).worker.replica_id not in {"prefill-065", "prefill-066"}

    def test_the_best_holder_that_failed_it_is_passed_over_for_the_next(self) -> None:
        parts = self.make(66, 1)
        for name, blocks in (("decode-000", 6), ("prefill-007", 5), ("prefill-050", 4)):
            parts.hold(name, blocks)
        tracked = make_tracked()
        tracked.avoid.add((ReplicaId("prefill-007"), 1))
        assert parts.assign(tracked).worker.replica_id == "prefill-050"

    def test_news_of_any_number_of_replicas_is_taken_before_it_is_needed(self) -> None:
        parts = self.make(65, 1)
        for number in range(5_000):
            parts.planner.note_load(ReplicaId(f"gone-{number}"))
        assert len(parts.assign(make_tracked()).considered) <= 3

    def test_prompts_for_one_worker_look_at_a_few_too(self) -> None:
        assert len(self.make(0, 65).assign(make_tracked()).considered) <= 3


class TestAvoided:
    def test_workers_that_failed_it_are_left_out_while_there_are_others(self) -> None:
        parts = RouterParts("prefill-0", "prefill-1", "decode-0")
        tracked = make_tracked()
        tracked.avoid.add((ReplicaId("prefill-0"), 1))
        assert names(parts.assign(tracked)) == ["prefill-1"]

    def test_where_there_are_none_they_are_held_back_for_a_while(self) -> None:
        parts = RouterParts("decode-0")
        tracked = make_tracked()
        tracked.avoid.add((ReplicaId("decode-0"), 1))
        tracked.hold_until_s = 1.0
        assert parts.planner.try_assign(tracked, 0.9) is None
        assert parts.assign(tracked, 1.0).worker.replica_id == "decode-0"

    def test_where_it_was_moved_from_it_does_not_go_at_once(self) -> None:
        parts = RouterParts("decode-0", "decode-1")
        tracked = make_tracked()
        tracked.moved_from = (ReplicaId("decode-0"), 1)
        assert parts.assign(tracked).worker.replica_id == "decode-1"
