"""What is loaded and saved in each step, against a store in a dictionary. Blocks have 4 tokens."""

from collections.abc import Sequence

import pytest

from kv_transfer.blocks import BlockKey
from kv_transfer.planner import KvDirective, LoadJob, SaveJob, ScheduledRequest, StepJobs, TransferPlanner
from tandem.domain import BlockHash, Namespace
from tests.dict_store import NAMESPACE, DictStore, chain

HASHES = chain(6)
TABLE = [10, 11, 12, 13, 14, 15]


class Lookups(DictStore):
    """A store that knows what it was told of uses."""

    def __init__(self, hashes: Sequence[BlockHash]) -> None:
        super().__init__(BlockKey(NAMESPACE, block_hash) for block_hash in hashes)
        self.used: list[list[BlockHash]] = []

    def note_use(self, namespace: Namespace, hashes: Sequence[BlockHash]) -> None:
        assert namespace == NAMESPACE
        self.used.append(list(hashes))


def holding(hashes: Sequence[BlockHash]) -> Lookups:
    return Lookups(hashes)


def planner_of(store: Lookups, *, sync_blocks: int = 100, load: bool = True, publish: bool = True) -> TransferPlanner:
    """A planner with one request, "r"."""
    planner = TransferPlanner(store, NAMESPACE, block_size_tokens=4, block_bytes=10, sync_load_bytes=10 * sync_blocks)
    planner.track("r", KvDirective(tag="r.d1", load=load, publish=publish))
    return planner


def step(
    planner: TransferPlanner, computed_after_tokens: int, *, prompt_tokens: int = 24, hashes: Sequence[BlockHash] = HASHES
) -> list[SaveJob]:
    """The saves of a step that computes "r" up to `computed_after_tokens`."""
    request = ScheduledRequest(
        request_id="r", computed_after_tokens=computed_after_tokens, prompt_tokens=prompt_tokens, hashes=hashes, block_ids=TABLE
    )
    return planner.plan_step([request]).saves


def save(first: int, last: int, *, prompt_hashes: list[BlockHash] | None = None) -> SaveJob:
    return SaveJob(
        request_id="r",
        tag="r.d1",
        block_ids=TABLE[first:last],
        hashes=HASHES[first:last],
        first_position=first,
        tenant=0,
        prompt_hashes=prompt_hashes,
    )


DIRECTIVES = [
    KvDirective(tag="a"),
    KvDirective(tag="b", load=False),
    KvDirective(tag="c", publish=False),
    KvDirective(tag="d", counts_use=False),
]


class TestDirective:
    @pytest.mark.parametrize("directive", DIRECTIVES)
    def test_comes_back_from_its_parameters(self, directive: KvDirective) -> None:
        assert KvDirective.from_params(directive.to_params()) == directive

    def test_without_parameters_a_request_neither_loads_nor_publishes(self) -> None:
        assert KvDirective.from_params(None) == KvDirective(tag="", load=False, publish=False, counts_use=False)


class TestMatch:
    def test_the_leading_blocks_of_the_store_are_matched(self) -> None:
        assert planner_of(holding(HASHES[:3])).match("r", HASHES, 25, 0) == (12, False)

    def test_blocks_after_a_missing_one_are_not_matched(self) -> None:
        assert planner_of(holding([HASHES[0], HASHES[2]])).match("r", HASHES, 25, 0) == (4, False)

    @pytest.mark.parametrize(("total_tokens", "matched"), [(24, 20), (25, 24), (23, 20), (21, 20), (20, 16), (1, 0)])
    def test_one_token_at_least_is_left_to_compute(self, total_tokens: int, matched: int) -> None:
        hashes = HASHES[: total_tokens // 4]
        assert planner_of(holding(HASHES)).match("r", hashes, total_tokens, 0) == (matched, False)

    def test_what_the_engine_holds_itself_is_not_matched(self) -> None:
        assert planner_of(holding(HASHES)).match("r", HASHES, 25, 8) == (16, False)

    def test_blocks_that_only_the_engine_holds_do_not_hide_later_ones(self) -> None:
        assert planner_of(holding(HASHES[2:4])).match("r", HASHES, 25, 8) == (8, False)

    def test_nothing_is_matched_where_the_engine_holds_it_all(self) -> None:
        assert planner_of(holding(HASHES)).match("r", HASHES, 25, 24) == (0, False)

    def test_asking_again_gives_the_same(self) -> None:
        planner = planner_of(holding(HASHES[:3]))
        assert [planner.match("r", HASHES, 25, 0) for _ in range(3)] == [(12, False)] * 3
        assert planner.plan_step([]) == StepJobs()

    def test_a_request_that_may_not_load_asks_nothing(self) -> None:
        assert planner_of(holding(HASHES), load=False).match("r", HASHES, 25, 0) == (0, False)

    def test_more_than_the_cap_is_loaded_outside_the_step(self) -> None:
        assert planner_of(holding(HASHES), sync_blocks=6).match("r", HASHES, 25, 0) == (24, False)
        assert planner_of(holding(HASHES), sync_blocks=5).match("r", HASHES, 25, 0) == (24, True)

    def test_the_cap_counts_all_requests_of_a_step(self) -> None:
        planner = planner_of(holding(HASHES), sync_blocks=7)
        planner.track("s", KvDirective(tag="s.d1"))
        assert planner.match("r", HASHES, 25, 0) == (24, False)
        planner.allocate("r", TABLE, 24)
        assert planner.match("s", HASHES, 25, 16) == (8, True)
        planner.plan_step([])
        assert planner.match("s", HASHES, 25, 16) == (8, False)

    def test_an_empty_match_is_never_outside_the_step(self) -> None:
        planner = planner_of(holding(HASHES), sync_blocks=1)
        planner.match("r", HASHES, 5, 0)
        planner.allocate("r", TABLE, 4)
        planner.track("s", KvDirective(tag="s.d1"))
        assert planner.match("s", HASHES, 25, 24) == (0, False)


class TestUses:
    def test_a_requests_prefix_is_told_once_as_used_wherever_it_is_taken_from(self) -> None:
        store = holding(HASHES[:4])
        planner = planner_of(store)
        for _ in range(2):
            planner.match("r", HASHES, 25, 8)
        assert store.used == [HASHES[:4]]

    def test_the_second_half_of_a_hand_off_is_no_use(self) -> None:
        store = holding(HASHES)
        planner = planner_of(store)
        planner.track("s", KvDirective(tag="s.d1", counts_use=False))
        assert planner.match("s", HASHES, 25, 0) == (24, False)
        assert store.used == []

    def test_what_is_matched_is_leased_until_it_is_loaded(self) -> None:
        store = holding(HASHES[:2])
        planner_of(store).match("r", HASHES, 25, 0)
        assert list(store.leased_until_s) == [BlockKey(NAMESPACE, block_hash) for block_hash in HASHES[:2]]


class TestLoads:
    def test_the_allocated_blocks_are_loaded_in_the_next_step_once(self) -> None:
        planner = planner_of(holding(HASHES))
        planner.match("r", HASHES, 25, 8)
        planner.allocate("r", TABLE, 16)
        job = LoadJob(request_id="r", tag="r.d1", local_tokens=8, block_ids=TABLE[2:6], hashes=HASHES[2:6], is_async=False)
        assert planner.plan_step([]).loads == [job]
        assert planner.plan_step([]).loads == []

    def test_a_part_of_the_match_is_loaded_where_the_engine_takes_a_part(self) -> None:
        planner = planner_of(holding(HASHES))
        planner.match("r", HASHES, 25, 8)
        planner.allocate("r", TABLE, 5)
        assert planner.plan_step([]).loads[0].block_ids == TABLE[2:4]

    def test_an_allocation_without_external_tokens_loads_nothing(self) -> None:
        planner = planner_of(holding([]))
        planner.match("r", HASHES, 25, 0)
        planner.allocate("r", TABLE, 0)
        assert planner.plan_step([]).loads == []

    def test_a_load_outside_the_step_is_marked_so_and_does_not_fill_the_cap(self) -> None:
        planner = planner_of(holding(HASHES), sync_blocks=2)
        planner.track("s", KvDirective(tag="s.d1"))
        planner.match("r", HASHES, 25, 0)
        planner.allocate("r", TABLE, 24)
        planner.allocate("r", TABLE, 0)  # the engine tells of an asynchronous load twice
        assert planner.match("s", HASHES, 25, 16) == (8, False)
        assert [job.is_async for job in planner.plan_step([]).loads] == [True]

    def test_a_request_whose_load_failed_is_never_given_blocks_again(self) -> None:
        planner = planner_of(holding(HASHES))
        planner.match("r", HASHES, 25, 0)
        planner.loads_failed(["r", "gone"])
        assert planner.match("r", HASHES, 25, 0) == (0, False)


class TestSaves:
    def test_the_full_blocks_of_each_chunk_are_saved_once(self) -> None:
        planner = planner_of(holding([]))
        assert step(planner, 10) == [save(0, 2)]
        assert step(planner, 11) == []
        assert step(planner, 21) == [save(2, 5)]
        assert step(planner, 24) == [save(5, 6, prompt_hashes=HASHES)]

    def test_the_last_chunk_carries_the_prompts_hashes_once(self) -> None:
        planner = planner_of(holding([]))
        assert step(planner, 18, prompt_tokens=18, hashes=HASHES[:4]) == [save(0, 4, prompt_hashes=HASHES[:4])]
        assert step(planner, 19, prompt_tokens=18, hashes=HASHES[:4]) == []
        assert step(planner, 20, prompt_tokens=18, hashes=HASHES[:5]) == [save(4, 5)]

    def test_a_prompt_that_ends_without_a_new_block_is_told_all_the_same(self) -> None:
        planner = planner_of(holding([]))
        assert step(planner, 8, prompt_tokens=10) == [save(0, 2)]
        assert step(planner, 10, prompt_tokens=10) == [save(2, 2, prompt_hashes=HASHES[:2])]

    def test_a_block_without_a_hash_is_not_saved(self) -> None:
        # A speculative token has KV but no hash before it is accepted.
        assert step(planner_of(holding([])), 12, prompt_tokens=10, hashes=HASHES[:2]) == [save(0, 2, prompt_hashes=HASHES[:2])]

    def test_dropped_saves_are_saved_again_and_told_again(self) -> None:
        planner = planner_of(holding([]))
        step(planner, 10, prompt_tokens=10)
        planner.saves_dropped(["r", "gone"])
        assert step(planner, 12, prompt_tokens=10) == [save(0, 3, prompt_hashes=HASHES[:2])]

    def test_a_request_that_may_not_publish_saves_nothing(self) -> None:
        assert step(planner_of(holding([]), publish=False), 24) == []

    def test_a_request_that_is_not_tracked_saves_nothing(self) -> None:
        planner = planner_of(holding([]))
        planner.finish("r")
        assert step(planner, 24) == []


def test_finish_frees_all_that_is_kept_of_a_request() -> None:
    planner = planner_of(holding(HASHES))
    assert len(planner) == 1
    planner.finish("r")
    planner.finish("r")
    assert len(planner) == 0
