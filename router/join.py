"""Joins the messages of one or more attempts into one stream, by position: nothing twice, nothing left out.

Must not know the wire: numbers in, ProtocolError where a worker breaks the rule.
"""

from collections.abc import Sequence

from tandem.errors import ProtocolError


class StreamJoin:
    """What has been sent of each choice. Positions start at `first_position`, the number of tokens the client had."""

    def __init__(self, first_position: int, choices: int) -> None:
        self._next = [first_position] * choices
        self._has_ended = [False] * choices
        self.output_tokens: list[int] = []  # sent, of the only choice; empty where there are several
        self.sent_tokens = 0

    @property
    def next_position(self) -> int:
        """Of the first choice."""
        return self._next[0]

    @property
    def has_ended(self) -> bool:
        """Whether every choice has its finish reason."""
        return all(self._has_ended)

    def add(self, choice_index: int, first_position: int, token_ids: Sequence[int], *, is_end: bool) -> None:
        """Takes one message's tokens. Raises ProtocolError for a gap, a repeat, an unknown choice or news after its end."""
        if not 0 <= choice_index < len(self._next):
            raise ProtocolError(f"choice {choice_index} of a request for {len(self._next)}")
        if self._has_ended[choice_index]:
            raise ProtocolError(f"choice {choice_index} goes on after its end")
        expected = self._next[choice_index]
        if token_ids and first_position != expected:
            raise ProtocolError(f"choice {choice_index} continues at position {first_position}, expected {expected}")
        self._next[choice_index] += len(token_ids)
        self._has_ended[choice_index] = is_end
        self.sent_tokens += len(token_ids)
        if len(self._next) == 1:
            self.output_tokens.extend(token_ids)
