"""A prefix is copied once its holders' queues have cost requests more than the copy takes, and only where that can help."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from router.config import RouterConfig
from router.hot_prefixes import HotPrefixes
from router.instructions import CopyPrefix
from router.interval import Interval
from router.placement import Assignment, Considered
from router.predict import LoadPredictor
from router.prefix_index import StoreHolder
from tandem.domain import BlockHash, Namespace, Role
from tests.router_parts import distrust, make_tracked
from tests.samples import ENGINE, make_lease

NAMESPACE = Namespace("ns")
HASHES = tuple(BlockHash(number.to_bytes(4, "big")) for number in range(100))
NO_TIME = Interval(0.0, 0.0)


def candidate(node: str, *, ahead_s: float = 0.0, own_s: float = 0.1, wait_s: float = 0.0, namespace: str = NAMESPACE) -> Considered:
    lease = make_lease(f"prefill-{node}", Role.PREFILL, node=node, namespace=Namespace(namespace))
    return Considered(
        lease=lease, cached_tokens=0, ahead_s=ahead_s, own_s=own_s, others_s=0.0, is_one_worker=False, fetched_tokens=0, wait_s=wait_s
    )


def choice(considered: Sequence[Considered], **stored_blocks: int) -> Assignment:
    """A prompt was given to the first of them."""
    return Assignment(
        worker=considered[0].lease,
        prefill=(),
        one_worker_reason="",
        policy="",
        cached_tokens=0,
        uncached_tokens=1,
        own_s=0.1,
        work_s=0.5,
        ahead_s=0.0,
        is_guess=False,
        queue=NO_TIME,
        ttft=NO_TIME,
        considered=tuple(considered),
        stored={StoreHolder(node, NAMESPACE): blocks for node, blocks in stored_blocks.items()},
    )


QUEUEING = choice([candidate("a", ahead_s=1.0), candidate("b", own_s=0.6)], a=50)  # each request loses half a second


class Bench:
    """Hot prefixes over nodes a, b and c with a store each; copying one block takes `block_s`."""

    def __init__(self, config: RouterConfig | None = None, *, block_s: float = 0.01, nodes: Sequence[str] = ("a", "b", "c")) -> None:
        self.predictor = LoadPredictor()
        for blocks in (1, 10, 100, 1000) * 10:
            size_bytes = blocks * ENGINE.kv_block_bytes
            self.predictor.observe_transfer("m", size_bytes=size_bytes, is_same_node=False, transfer_s=block_s * blocks)
        self.hot = HotPrefixes(config or RouterConfig(), self.predictor)
        self.hot.stores_known(nodes)

    def note(self, assignment: Assignment | None, now_s: float, hashes: Sequence[BlockHash] = HASHES) -> list[CopyPrefix]:
        return self.hot.note(replace(make_tracked(), block_hashes=hashes), assignment, now_s)

    def run(self, assignment: Assignment | None = QUEUEING, *, until_s: float = 10.0, start_s: float = 0.0) -> list[CopyPrefix]:
        """One request each half second, until a copy is asked for."""
        for step in range(int(2 * (until_s - start_s))):
            copies = self.note(assignment, start_s + step / 2)
            if copies:
                return copies
        return []


def test_a_prefix_whose_holder_queues_is_copied_to_the_node_that_has_it_not() -> None:
    (copy,) = Bench().run()
    assert (copy.source_node, copy.target_node, copy.namespace, copy.request_id) == ("a", "b", NAMESPACE, "r1")
    assert tuple(copy.block_hashes) == HASHES[:50]


def test_a_node_is_being_copied_to_until_its_copy_ends() -> None:
    bench = Bench()
    (copy,) = bench.run()
    assert bench.hot.copying == {"b"}
    bench.hot.ended(copy, 9.0, is_whole=True)
    assert bench.hot.copying == frozenset()


def test_one_busy_moment_copies_nothing() -> None:
    bench = Bench()
    assert not any(bench.note(QUEUEING, 0.01 * number) for number in range(100))


def test_few_requests_copy_nothing_however_long_they_waited() -> None:
    bench = Bench()
    assert not any(bench.note(QUEUEING, 30.0 * number) for number in range(20))


def test_what_was_lost_long_ago_does_not_count() -> None:
    bench = Bench()
    for number in range(10):
        assert bench.note(QUEUEING, 0.01 * number) == []
    assert bench.note(QUEUEING, 100.0) == []


def test_a_copy_that_takes_longer_than_what_was_lost_is_not_made() -> None:
    assert Bench(block_s=0.5).run() == []


@pytest.mark.parametrize(
    "assignment",
    [
        None,
        choice([candidate("a", ahead_s=1.0), candidate("b", ahead_s=1.0, own_s=0.6)], a=50),  # the other queues as much
        choice([candidate("a", ahead_s=1.0), candidate("b")], a=50),  # the other would be as quick without it
        choice([candidate("a", ahead_s=1.0), candidate("b", own_s=0.6)], a=3),  # too few blocks
        choice([candidate("a", ahead_s=1.0), candidate("b", own_s=0.6)]),  # nobody holds any
        choice([candidate("a", ahead_s=1.0), candidate("b", own_s=0.6)], a=50, b=50),  # both have it
        choice([candidate("a", ahead_s=1.0), candidate("b", own_s=0.6)], a=50, b=26),  # most of it
        choice([candidate("a", ahead_s=1.0), candidate("d", own_s=0.6)], a=50),  # a node without a store
        choice([candidate("b", ahead_s=1.0), candidate("c", own_s=0.6)], a=50),  # nobody computes on the holder's node
        choice([candidate("a", ahead_s=1.0), candidate("b", own_s=0.6, namespace="other")], a=50),
        choice([candidate("a", ahead_s=1.0), candidate("b", own_s=0.6)], d=50),  # only a store that is gone has it
    ],
)
def test_nothing_is_copied_where_no_request_would_gain(assignment: Assignment | None) -> None:
    assert Bench(block_s=1e-4).run(assignment) == []


def test_a_request_placed_elsewhere_because_of_the_queue_counts_as_well() -> None:
    (copy,) = Bench().run(choice([candidate("b", wait_s=0.3), candidate("a", ahead_s=5.0)], a=50))
    assert (copy.source_node, copy.target_node) == ("a", "b")


def test_the_fullest_store_is_the_source_and_the_idlest_node_the_target() -> None:
    considered = [candidate("a", ahead_s=1.0), candidate("b", own_s=0.7), candidate("c", own_s=0.6)]
    (copy,) = Bench().run(choice(considered, a=50, c=10))
    assert (copy.source_node, copy.target_node) == ("a", "c")


def test_prompts_that_go_on_differently_are_hot_together() -> None:
    bench = Bench()
    copies = []
    for number in range(20):
        own = tuple(BlockHash(b"%d %d" % (number, block)) for block in range(100))
        copies += bench.note(QUEUEING, number / 2, (*HASHES[:20], *own[20:]))
    assert tuple(copies[0].block_hashes) == HASHES[:16]


def test_one_node_is_enough_for_nothing() -> None:
    assert Bench(nodes=("a",)).run() == []


@pytest.mark.parametrize("config", [RouterConfig(max_prefix_copies=0), RouterConfig(policy="lmetric")])
def test_it_can_be_switched_off_and_other_policies_do_without(config: RouterConfig) -> None:
    assert Bench(config).run() == []


def test_distrusted_seconds_copy_nothing() -> None:
    bench = Bench()
    distrust(bench.predictor)
    assert bench.run() == []


def test_while_a_copy_runs_no_other_goes_to_its_node_and_then_what_is_still_lost_counts_anew() -> None:
    bench = Bench()
    (copy,) = bench.run()
    assert bench.run(start_s=10.0, until_s=20.0) == []
    bench.hot.ended(copy, 20.0, is_whole=True)
    assert bench.note(QUEUEING, 20.5) == []  # its store has yet to tell
    assert len(bench.note(QUEUEING, 21.0)) == 1


def test_a_node_that_a_copy_failed_to_is_left_alone_for_a_while_and_others_are_not() -> None:
    bench = Bench()
    (copy,) = bench.run()
    bench.hot.ended(copy, 10.0, is_whole=False)
    assert bench.run(start_s=10.0, until_s=20.0) == []
    other = choice([candidate("a", ahead_s=1.0), candidate("c", own_s=0.6)], a=50)
    assert bench.note(other, 19.9)[0].target_node == "c"
    assert bench.note(QUEUEING, 20.0) == []  # counts anew
    assert len(bench.run(start_s=20.5, until_s=30.0)) == 1


def test_a_node_that_left_is_not_kept_in_mind() -> None:
    bench = Bench()
    (copy,) = bench.run()
    bench.hot.stores_known(("a", "c"))
    bench.hot.ended(copy, 10.0, is_whole=False)
    bench.hot.stores_known(("a", "b", "c"))
    assert len(bench.run(start_s=10.0, until_s=15.0)) == 1


def test_no_more_than_so_many_run_at_once() -> None:
    bench = Bench(RouterConfig(max_prefix_copies=1))
    assert len(bench.run()) == 1
    assert bench.run(choice([candidate("a", ahead_s=1.0), candidate("c", own_s=0.6)], a=50), start_s=10.0, until_s=20.0) == []


def test_copies_keep_to_their_bytes_a_second() -> None:
    bench = Bench(RouterConfig(prefix_copy_bytes_per_s=50 * ENGINE.kv_block_bytes / 100.0))
    (copy,) = bench.run()
    bench.hot.ended(copy, 2.0, is_whole=True)
    assert bench.run(start_s=2.0, until_s=100.0) == []
    assert len(bench.run(start_s=100.0, until_s=110.0)) == 1
