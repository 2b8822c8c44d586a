"""The joiner takes a stream in whole or not at all."""

import pytest

from tandem.domain import Chunk, FinishReason
from tandem.errors import ProtocolError
from tandem.session import StreamJoiner


def joined(joiner: StreamJoiner, *chunks: Chunk) -> StreamJoiner:
    for chunk in chunks:
        joiner.join(chunk)
    return joiner


def test_chunks_join_by_position() -> None:
    joiner = joined(
        StreamJoiner(),
        Chunk(first_position=0, token_ids=(5,)),
        Chunk(first_position=1, token_ids=(6, 7), text="ab"),
        Chunk(first_position=3, text="held back"),
        Chunk(first_position=3, token_ids=(8,), finish_reason=FinishReason.STOP),
    )
    joiner.end()
    assert joiner.token_ids() == (5, 6, 7, 8)
    assert joiner.next_position() == 4
    assert joiner.is_finished


def test_a_resumed_stream_starts_after_its_tokens() -> None:
    joiner = joined(StreamJoiner(first_position=3), Chunk(first_position=3, token_ids=(9,)))
    assert joiner.token_ids() == (9,)
    assert joiner.next_position() == 4


def test_choices_are_counted_apart() -> None:
    joiner = joined(
        StreamJoiner(num_choices=2),
        Chunk(first_position=0, token_ids=(1, 2), choice_index=1, finish_reason=FinishReason.STOP),
        Chunk(first_position=0, token_ids=(3,), choice_index=0),
    )
    assert (joiner.token_ids(0), joiner.token_ids(1)) == ((3,), (1, 2))
    assert not joiner.is_finished


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (Chunk(first_position=3, token_ids=(9,)), "gap: expected position 2, got 3"),
        (Chunk(first_position=3), "gap: expected position 2, got 3"),
        (Chunk(first_position=1, token_ids=(9,)), "repeats a token: expected position 2, got 1"),
        (Chunk(first_position=1, token_ids=(9, 9)), "repeats a token"),
        (Chunk(first_position=0, token_ids=(9,), choice_index=1), "choice 1 was not asked for"),
    ],
)
def test_what_does_not_join_is_refused_and_changes_nothing(chunk: Chunk, words: str) -> None:
    joiner = joined(StreamJoiner(), Chunk(first_position=0, token_ids=(1, 2)))
    with pytest.raises(ProtocolError, match=words):
        joiner.join(chunk)
    assert joiner.token_ids() == (1, 2)
    assert not joiner.is_finished


def test_nothing_may_follow_the_finish_reason() -> None:
    joiner = joined(StreamJoiner(), Chunk(first_position=0, token_ids=(1,), finish_reason=FinishReason.STOP))
    with pytest.raises(ProtocolError, match="went on after"):
        joiner.join(Chunk(first_position=1, token_ids=(2,)))


def test_an_end_without_a_finish_reason_is_refused() -> None:
    joiner = joined(StreamJoiner(num_choices=2), Chunk(first_position=0, token_ids=(1,), finish_reason=FinishReason.STOP))
    with pytest.raises(ProtocolError, match=r"choices \[1\]"):
        joiner.end()
