"""Joins the chunks of one request's stream by position: never a token twice, never a gap.

Pure: whoever reads the stream feeds it. It holds the tokens so far, which is all that a continuation needs.
"""

from tandem.domain import Chunk
from tandem.errors import ProtocolError


class StreamJoiner:
    """The output of one request so far, per choice, from position `first_position` (the number of resumed tokens) on."""

    def __init__(self, *, first_position: int = 0, num_choices: int = 1) -> None:
        self._first_position = first_position
        self._tokens: list[list[int]] = [[] for _ in range(num_choices)]
        self._is_finished = [False] * num_choices

    @property
    def is_finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return all(self._is_finished)

    def token_ids(self, choice_index: int = 0) -> tuple[int, ...]:
        """The tokens of one choice that came through this stream; O(n)."""
        return tuple(self._tokens[choice_index])

    def next_position(self, choice_index: int = 0) -> int:
        """Where that choice's next token belongs."""
        return self._first_position + len(self._tokens[choice_index])

    def join(self, chunk: Chunk) -> None:
        """Takes the chunk in, or leaves all as it was and raises ProtocolError.

        Refused are a gap, a token that is already here, a chunk after its choice's end, and a choice that was not asked for.
        """
        index = chunk.choice_index
        if index >= len(self._tokens):
            raise ProtocolError(f"choice {index} was not asked for: there are {len(self._tokens)}")
        if self._is_finished[index]:
            raise ProtocolError(f"choice {index} went on after its finish reason")
        expected = self.next_position(index)
        if chunk.first_position > expected:
            raise ProtocolError(f"choice {index} has a gap: expected position {expected}, got {chunk.first_position}")
        if chunk.first_position < expected and chunk.token_ids:
            raise ProtocolError(f"choice {index} repeats a token: expected position {expected}, got {chunk.first_position}")
        self._tokens[index].extend(chunk.token_ids)
        self._is_finished[index] = chunk.finish_reason is not None

    def end(self) -> None:
        """Checks the stream's good end; raises ProtocolError where a choice has no finish reason."""
        if not self.is_finished:
            missing = [index for index, is_finished in enumerate(self._is_finished) if not is_finished]
            raise ProtocolError(f"the stream ended without a finish reason for choices {missing}")
