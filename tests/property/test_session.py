"""However a stream is cut into chunks, the joiner gives the tokens; and any chunk lost or repeated is found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.domain import Chunk, FinishReason
from tandem.errors import ProtocolError
from tandem.session import StreamJoiner

sizes = st.lists(st.integers(1, 4), min_size=2, max_size=8)


def cut(first_position: int, chunk_sizes: list[int]) -> list[Chunk]:
    """A stream of tokens 0, 1, ... in chunks of these sizes, the last one with the finish reason."""
    chunks = []
    position = 0
    for number, size in enumerate(chunk_sizes):
        finish_reason = FinishReason.STOP if number == len(chunk_sizes) - 1 else None
        tokens = tuple(range(position, position + size))
        chunks.append(Chunk(first_position=first_position + position, token_ids=tokens, finish_reason=finish_reason))
        position += size
    return chunks


def read(joiner: StreamJoiner, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        joiner.join(chunk)
    joiner.end()


@given(st.integers(0, 100), sizes)
def test_any_cut_gives_the_same_tokens(first_position: int, chunk_sizes: list[int]) -> None:
    joiner = StreamJoiner(first_position=first_position)
    read(joiner, cut(first_position, chunk_sizes))
    assert joiner.token_ids() == tuple(range(sum(chunk_sizes)))


@given(sizes, st.data())
def test_a_lost_repeated_or_swapped_chunk_is_found(chunk_sizes: list[int], data: st.DataObject) -> None:
    chunks = cut(0, chunk_sizes)
    at = data.draw(st.integers(0, len(chunks) - 2))
    lost = [*chunks[:at], *chunks[at + 1 :]]
    repeated = [*chunks[: at + 1], *chunks[at:]]
    swapped = [*chunks[:at], chunks[at + 1], chunks[at], *chunks[at + 2 :]]
    for broken in (lost, repeated, swapped, chunks[:-1]):
        with pytest.raises(ProtocolError):
            read(StreamJoiner(), broken)
