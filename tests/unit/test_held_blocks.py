"""What a listener to a cache is told: all that is held, then what changes, and all of it again before anything is lost."""

from tandem.held_blocks import BlockChange, HeldBlocks


def blocks(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def stored(*numbers: int) -> BlockChange:
    return BlockChange(stored=blocks(*numbers))


def removed(*numbers: int) -> BlockChange:
    return BlockChange(removed=blocks(*numbers))


def test_a_listener_is_told_what_is_held_then_what_changes() -> None:
    held = HeldBlocks()
    held.apply(stored(1, 2, 3))
    held.apply(removed(2))
    with held.listen() as teller:
        assert teller.take(10) == BlockChange(is_cleared=True, stored=blocks(1, 3))
        assert not teller.take(10)
        held.apply(BlockChange(stored=blocks(4), removed=blocks(1)))
        assert teller.take(10) == BlockChange(stored=blocks(4), removed=blocks(1))
    held.apply(stored(5))
    assert len(held) == 3


def test_an_empty_cache_clears_what_was_believed_of_it() -> None:
    with HeldBlocks().listen() as teller:
        assert teller.take(10) == BlockChange(is_cleared=True)


def test_a_snapshot_comes_in_pieces_and_changes_after_it() -> None:
    held = HeldBlocks()
    held.apply(stored(*range(5)))
    with held.listen() as teller:
        assert teller.take(2) == BlockChange(is_cleared=True, stored=blocks(0, 1))
        assert teller.is_behind
        held.apply(BlockChange(stored=blocks(9), removed=blocks(0, 3)))
        assert teller.take(2) == stored(2)  # 3 has gone meanwhile
        assert teller.take(2) == stored(4)
        assert not teller.is_behind
        assert teller.take(2) == removed(0, 3)
        assert teller.take(2) == stored(9)


def test_of_one_block_the_last_change_counts() -> None:
    held = HeldBlocks()
    with held.listen() as teller:
        teller.take(1)
        held.apply(stored(1))
        held.apply(removed(1))
        held.apply(stored(2))
        held.apply(removed(2))
        held.apply(stored(2))
        assert teller.take(10) == BlockChange(stored=blocks(2), removed=blocks(1))


def test_who_reads_too_slowly_is_told_all_anew() -> None:
    held = HeldBlocks(max_untold_blocks=3)
    held.apply(stored(0))
    with held.listen() as slow, held.listen() as quick:
        slow.take(10)
        quick.take(10)
        for number in range(1, 5):
            held.apply(stored(number))
            assert quick.take(10) == stored(number)
        assert slow.take(10) == BlockChange(is_cleared=True, stored=blocks(0, 1, 2, 3, 4))


def test_a_cleared_cache_clears_what_its_listeners_were_told() -> None:
    held = HeldBlocks()
    held.apply(stored(1, 2))
    with held.listen() as teller:
        teller.take(10)
        held.apply(stored(3))
        held.apply(BlockChange(is_cleared=True))
        held.apply(stored(4))
        assert teller.take(10) == BlockChange(is_cleared=True, stored=blocks(4))
