"""Blocks that no candidate's node has are fetched from another where that is quicker than to compute them."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from router.placement import QUICKER
from router.prefix_index import StoreHolder
from tandem.domain import Namespace
from tests.router_parts import HANDING_OFF, HASHES, RouterParts, make_tracked

NAMESPACE = Namespace("ns")


def make(*, byte_s: float, node: str = "node-9", config: RouterConfig = HANDING_OFF) -> RouterParts:
    """A store has 5 blocks of 131,072 bytes; transfers take so long a byte."""
    parts = RouterParts("prefill-0", "prefill-1", "decode-0", config=config)
    parts.prefixes.record(HASHES[:5], StoreHolder(node, NAMESPACE))
    for size_bytes in (10**5, 10**6, 10**7):
        parts.predictor.observe_transfer("m", size_bytes=size_bytes, is_same_node=False, transfer_s=byte_s * size_bytes)
    return parts


def test_a_quick_fetch_spares_their_computation() -> None:
    parts = make(byte_s=1e-10)
    assignment = parts.assign(make_tracked())
    one = assignment.considered[0]
    assert (assignment.cached_tokens, assignment.uncached_tokens, one.fetched_tokens) == (160, 32, 160)
    assert one.wait_s == assignment.wait_s == pytest.approx(5 * 131_072 * 1e-10, rel=0.2)
    assert assignment.ttft.mean_s == pytest.approx(one.total_s)
    assert parts.place(make_tracked()).prefill_s.mean_s == pytest.approx(one.total_s)


def test_the_work_ahead_hides_the_wait() -> None:
    parts = make(byte_s=1e-10)
    for name in ("prefill-0", "prefill-1"):
        parts.give(name, 0.02)
    assignment = parts.assign(make_tracked())
    assert (assignment.cached_tokens, assignment.wait_s) == (160, 0.0)


def test_what_waits_in_the_line_is_not_fetched_yet() -> None:
    parts = make(byte_s=1.5e-8, config=replace(HANDING_OFF, ahead_s=0.0))
    for name in ("prefill-0", "prefill-1"):
        parts.engine(name, max_num_batched_tokens=32)
        parts.give(name, 9.0)
    one = parts.assign(make_tracked(prompt_tokens=192)).considered[0]
    fetch_s = parts.predictor.transfer_s("m", size_bytes=5 * 131_072, is_same_node=False)
    hidden_s = parts.planner.chunk_s(one.lease)
    assert one.ahead_s == 9.0
    assert one.wait_s == pytest.approx(fetch_s - hidden_s)


def test_a_slow_fetch_is_left() -> None:
    assignment = make(byte_s=1e-6).assign(make_tracked())
    assert (assignment.cached_tokens, assignment.considered[0].fetched_tokens, assignment.wait_s) == (0, 0, 0.0)


def test_what_a_replica_has_itself_is_not_fetched() -> None:
    parts = make(byte_s=1e-10)
    parts.hold("prefill-1", 5)
    assignment = parts.assign(make_tracked())
    assert (assignment.worker.replica_id, assignment.considered[0].fetched_tokens) == ("prefill-1", 0)


def test_the_store_of_its_own_node_costs_nothing() -> None:
    one = make(byte_s=1e-6, node="node-0").assign(make_tracked()).considered[0]
    assert (one.cached_tokens, one.fetched_tokens, one.wait_s) == (160, 0, 0.0)


def test_a_store_of_another_namespace_has_nothing() -> None:
    parts = RouterParts("prefill-0", "decode-0")
    parts.prefixes.record(HASHES[:5], StoreHolder("node-9", Namespace("other")))
    parts.predictor.observe_transfer("m", size_bytes=10**6, is_same_node=False, transfer_s=1e-4)
    assert parts.assign(make_tracked()).cached_tokens == 0


def test_policies_of_others_do_not_know_of_it() -> None:
    parts = RouterParts("prefill-0", "prefill-1", "decode-0", config=replace(HANDING_OFF, policy="sglang_cache_aware"))
    parts.prefixes.record(HASHES, StoreHolder("node-9", NAMESPACE))
    parts.predictor.observe_transfer("m", size_bytes=10**6, is_same_node=False, transfer_s=1e-4)
    parts.hold("prefill-1", 4)
    assert parts.assign(make_tracked()).worker.replica_id == "prefill-1"


def test_one_worker_that_may_fetch_is_looked_at_as_if_its_blocks_were_there() -> None:
    parts = make(byte_s=1e-10, config=RouterConfig())
    parts.report("decode-0", running_requests=3, kv_tokens=300)
    for name in ("prefill-0", "prefill-1"):
        parts.give(name, 0.05)
    assignment = parts.assign(make_tracked())
    assert (assignment.one_worker_reason, assignment.considered[0].fetched_tokens) == (QUICKER, 160)
