"""After any events the index says what a plain model of sets says, as long as nothing has to be evicted."""

import hashlib
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from router.block_probe_library import load_probe
from router.prefix_index import Holder, PrefixIndex
from tandem.domain import BlockHash, ReplicaId
from tandem.short_hash import short_hashes

HOLDERS: list[Holder] = [(ReplicaId(f"r{number}"), 1) for number in range(12)]
CHAIN = [BlockHash(hashlib.sha256(bytes([number])).digest()) for number in range(24)]

spans = st.tuples(st.integers(0, 23), st.integers(1, 24))
events = st.lists(
    st.tuples(st.sampled_from(["record", "store", "remove", "correct", "clear", "drop"]), st.sampled_from(HOLDERS), spans), max_size=60
)


@given(events=events, is_compiled=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_index_agrees_with_a_plain_model(events: list[tuple[str, Holder, tuple[int, int]]], is_compiled: bool) -> None:
    index, model = PrefixIndex(4096, load_probe() if is_compiled else None), defaultdict[Holder, set[int]](set)
    for kind, holder, (begin, length) in events:
        blocks = range(begin, min(begin + length, len(CHAIN)))
        hashes = [CHAIN[number] for number in blocks]
        match kind:
            case "record":
                index.record(hashes, holder)
                model[holder] |= set(blocks)
            case "store":
                index.apply(holder, short_hashes(hashes), short_hashes([]))
                model[holder] |= set(blocks)
            case "remove":
                index.apply(holder, short_hashes([]), short_hashes(hashes))
                model[holder] -= set(blocks)
            case "correct":
                index.correct(CHAIN, holder, begin)
                model[holder] -= set(range(begin, len(CHAIN)))
            case "clear":
                index.clear(holder)
                model[holder].clear()
            case _:
                index.drop(holder)
                model[holder].clear()
        index.check_invariants()
    leading = {holder: next((number for number in range(len(CHAIN)) if number not in held), len(CHAIN)) for holder, held in model.items()}
    assert index.match(CHAIN) == {holder: blocks for holder, blocks in leading.items() if blocks}
    assert len(index) == len(set().union(*model.values()))


@given(chains=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60), st.sampled_from(HOLDERS)), max_size=40), bound=st.integers(1, 90))
@settings(max_examples=80, deadline=None)
def test_the_bound_holds_and_nothing_is_invented(chains: list[tuple[int, int, Holder]], bound: int) -> None:
    index, told = PrefixIndex(bound), defaultdict[Holder, set[BlockHash]](set)
    for name, length, holder in chains:
        hashes = [BlockHash(hashlib.sha256(f"{name}/{number}".encode()).digest()) for number in range(length)]
        index.record(hashes, holder)
        told[holder] |= set(hashes)
        assert len(index) <= bound
        for found, blocks in index.match(hashes).items():
            assert set(hashes[:blocks]) <= told[found]
    index.check_invariants()
