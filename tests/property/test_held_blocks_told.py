"""Whatever happens in a cache and however seldom a listener reads, in the end it knows what is held."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.held_blocks import BlockChange, HeldBlocks
from tandem.short_hash import split

numbers = st.sets(st.integers(0, 11), max_size=6)
events = st.lists(st.one_of(st.tuples(numbers, numbers), st.sampled_from(["clear", "take"])), max_size=50)


def joined(values: set[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in sorted(values))


def learn(known: set[bytes], change: BlockChange) -> set[bytes]:
    """A router's view after one message."""
    left = set() if change.is_cleared else known
    return left - set(split(change.removed)) | set(split(change.stored))


@given(before=numbers, events=events, piece=st.integers(1, 5), bound=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_a_listener_ends_up_with_what_is_held(
    before: set[int], events: list[tuple[set[int], set[int]] | str], piece: int, bound: int
) -> None:
    held, truth, known = HeldBlocks(bound), set(before), set[bytes]()
    held.apply(BlockChange(stored=joined(before)))
    with held.listen() as teller:
        for event in events:
            if event == "take":
                known = learn(known, teller.take(piece))
            elif isinstance(event, str):
                held.apply(BlockChange(is_cleared=True))
                truth.clear()
            else:
                added, gone = event
                held.apply(BlockChange(stored=joined(added), removed=joined(gone - added)))
                truth = truth - gone | added
        while teller.is_behind or (change := teller.take(piece)):
            known = learn(known, teller.take(piece) if teller.is_behind else change)
    assert known == set(split(joined(truth)))
    assert len(held) == len(truth)
