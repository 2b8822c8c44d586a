"""How prefill candidates are ranked. Predictions here: 1 ms a token, and nothing of the context."""

from collections.abc import Sequence
from random import Random

import pytest

from router.policies import (
    DEFAULT_POLICY,
    PEER_POLICIES,
    POLICIES,
    DynamoParameters,
    LlmdParameters,
    PolicyParameters,
    PolicyState,
    PrebleParameters,
    PrefillJob,
    PrefillView,
    SglangParameters,
)
from tandem.domain import ReplicaId


def job(prompt_tokens: int = 1000, *, session: str = "", now_s: float = 0.0) -> PrefillJob:
    return PrefillJob(
        prompt_tokens=prompt_tokens,
        prefill_s=lambda uncached, cached: 1e-3 * uncached,
        session=session,
        block_size_tokens=100,
        now_s=now_s,
    )


def view(
    number: int,
    *,
    cached: int = 0,
    ahead_s: float = 0.0,
    ahead_tokens: int = 0,
    running: int = 0,
    kv_tokens: int = 0,
) -> PrefillView:
    return PrefillView(
        replica_id=ReplicaId(f"p{number:03d}"),
        cached_tokens=cached,
        ahead_s=ahead_s,
        ahead_tokens=ahead_tokens,
        running_requests=running,
        kv_tokens=kv_tokens,
        kv_room_tokens=10_000,
    )


def state(parameters: PolicyParameters | None = None) -> PolicyState:
    return PolicyState(rng=Random(3), parameters=PolicyParameters() if parameters is None else parameters)


def best(policy: str, views: Sequence[PrefillView], of: PrefillJob | None = None, memory: PolicyState | None = None) -> int:
    return PEER_POLICIES[policy](job() if of is None else of, views, state() if memory is None else memory)[0]


@pytest.mark.parametrize("policy", PEER_POLICIES)
def test_a_ranking_names_candidates_once_and_the_first_of_one_is_that_one(policy: str) -> None:
    views = [view(number, ahead_s=0.1 * number, running=number) for number in range(5)]
    ranking = PEER_POLICIES[policy](job(session="s"), views, state())
    assert ranking
    assert len(set(ranking)) == len(ranking)
    assert set(ranking) <= set(range(5))
    assert PEER_POLICIES[policy](job(), views[:1], state()) == [0]


@pytest.mark.parametrize("policy", sorted(set(PEER_POLICIES) - {"random", "power_of_two", "session_hash", "round_robin"}))
def test_ties_go_to_the_lower_id(policy: str) -> None:
    assert best(policy, [view(2), view(1), view(3)]) == 1


def test_the_default_is_the_planners_own() -> None:
    assert POLICIES[0] == DEFAULT_POLICY
    assert DEFAULT_POLICY not in PEER_POLICIES


def test_round_robin_takes_each_in_turn() -> None:
    memory = state()
    assert [best("round_robin", [view(1), view(2), view(3)], memory=memory) for _ in range(4)] == [0, 1, 2, 0]


def test_random_and_the_two_of_power_of_two_come_from_the_seed() -> None:
    views = [view(number, ahead_s=float(number)) for number in range(8)]
    assert PEER_POLICIES["random"](job(), views, state()) == PEER_POLICIES["random"](job(), views, state())
    first, second = PEER_POLICIES["power_of_two"](job(), views, state())
    assert first < second


def test_least_requests_and_join_shortest_work_look_at_different_things() -> None:
    views = [view(1, running=1, ahead_s=9.0), view(2, running=2, ahead_s=1.0)]
    assert best("least_requests", views) == 0
    assert best("join_shortest_work", views) == 1


def test_a_session_stays_where_it_is_when_another_replica_goes() -> None:
    views = [view(number) for number in range(6)]
    ranking = PEER_POLICIES["session_hash"](job(session="one"), views, state())
    gone = ranking[1]
    left = [one for index, one in enumerate(views) if index != gone]
    assert left[best("session_hash", left, job(session="one"))] == views[ranking[0]]


def test_without_a_session_session_hash_takes_the_fewest_requests() -> None:
    assert best("session_hash", [view(1, running=3), view(2)]) == 1


def test_lmetric_weighs_new_tokens_by_the_batch_and_zeros_do_not_tie() -> None:
    assert best("lmetric", [view(1, cached=999, running=3), view(2)]) == 0
    assert best("lmetric", [view(1, running=1), view(2)]) == 1


def test_dynamo_gives_credit_for_overlap_and_charges_blocks_and_requests() -> None:
    plain = state(PolicyParameters(dynamo=DynamoParameters(prefill_scale=1.0, request_blocks=0.0)))
    assert best("dynamo_cost", [view(1), view(2, cached=500)], memory=plain) == 1
    assert best("dynamo_cost", [view(1), view(2, cached=500, kv_tokens=600)], memory=plain) == 0
    costly = state(PolicyParameters(dynamo=DynamoParameters(prefill_scale=1.0, request_blocks=10.0)))
    assert best("dynamo_cost", [view(1), view(2, cached=500, running=1)], memory=costly) == 0


def test_llmd_adds_weighted_scores() -> None:
    views = [view(1, cached=1000, running=4), view(2)]
    assert best("llmd_weighted", views, memory=state(PolicyParameters(llmd=LlmdParameters(prefix_weight=3, queue_weight=2)))) == 0
    assert best("llmd_weighted", views, memory=state(PolicyParameters(llmd=LlmdParameters(prefix_weight=1, queue_weight=2)))) == 1


def test_sglang_balances_where_loads_are_uneven_follows_matches_and_else_grows_the_smallest_tree() -> None:
    memory = state(PolicyParameters(sglang=SglangParameters(match_threshold=0.5, gap_requests=4, gap_ratio=1.1)))
    assert best("sglang_cache_aware", [view(1, cached=900, running=5), view(2)], memory=memory) == 1
    assert best("sglang_cache_aware", [view(1, cached=900, running=4), view(2)], memory=memory) == 0
    assert memory.given_tokens == {ReplicaId("p001"): 100, ReplicaId("p002"): 1000}
    assert best("sglang_cache_aware", [view(1), view(2)], memory=memory) == 0
    memory.forget(ReplicaId("p001"))
    assert memory.given_tokens == {ReplicaId("p002"): 1000}


def test_preble_exploits_a_hit_of_more_than_half_until_its_holder_has_been_given_too_much() -> None:
    memory = state(PolicyParameters(preble=PrebleParameters(window_s=10.0, uneven_ratio=2.0)))
    holder = [view(1), view(2, cached=600)]
    assert [best("preble_e2", holder, memory=memory) for _ in range(4)] == [1, 1, 1, 0]
    assert best("preble_e2", holder, job(now_s=20.0), memory) == 1, "what lies before the window is forgotten"
    memory.forget(ReplicaId("p002"))
    assert memory.given_work.keys() == {ReplicaId("p001")}


def test_preble_explores_by_the_work_given_and_this_prefill() -> None:
    memory = state()
    views = [view(1), view(2), view(3, cached=300)]
    assert [best("preble_e2", views, memory=memory) for _ in range(3)] == [2, 0, 1]
