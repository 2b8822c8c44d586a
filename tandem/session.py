"""Continuing a request whose stream was lost: which losses, how often, how soon, from which token. Router and SDK go by this.

Pure: whoever reads the stream feeds it. It holds the tokens so far, which is all that a continuation needs: none twice, no gap.
"""

from dataclasses import dataclass
from random import Random

from tandem.domain import Chunk
from tandem.errors import Code, ProtocolError, Reason, TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a lost stream is continued, and how soon: after a pause that doubles, with jitter."""

    budget: int  # further streams after the first, in all
    first_pause_s: float = 0.0
    max_pause_s: float = 0.0


# A router that `tandem up` starts anew is back in two seconds; these pauses come to between two and four.
CLIENT_RETRIES = RetryPolicy(budget=8, first_pause_s=0.02, max_pause_s=1.0)
# Nothing has come yet, so there may be nobody there: say so soon.
FIRST_RETRIES = 2


def is_continuable(num_choices: int, output_tokens: int) -> bool:
    """Whether a request goes on from its tokens. Several choices can be started again, not continued: their positions are not one chain."""
    return num_choices == 1 or output_tokens == 0


def has_lost_worker(error: TandemError) -> bool:
    """Whether it is the worker that failed and not the request, so that another one may go on."""
    has_other = error.reason is Reason.STALE_INCARNATION or error.code is Code.UNIMPLEMENTED  # it restarted, or its port is another's now
    return error.retryable or has_other


def has_lost_router(error: TandemError) -> bool:
    """Whether the stream was lost with its router, so that another one may go on; what a router says itself holds for all of them.

    A router that gives a request up has tried it on several workers: whoever asks again multiplies what a request can break.
    """
    # Cancelled, and not by the caller: a server that ends cancels its calls.
    return error.code is Code.CANCELLED or error.reason is Reason.CONNECTION_LOST


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


class Session:
    """One request over as many streams as it takes; the caller reads them, one after another."""

    def __init__(self, policy: RetryPolicy, rng: Random, *, first_position: int = 0, num_choices: int = 1) -> None:
        self.joiner = StreamJoiner(first_position=first_position, num_choices=num_choices)
        self.tries = 1  # streams so far, with the one being read
        self._policy = policy
        self._rng = rng
        self._num_choices = num_choices

    @property
    def output_tokens(self) -> int:
        """Tokens that came, of all choices."""
        return sum(len(self.joiner.token_ids(index)) for index in range(self._num_choices))

    def lost(self, error: TandemError) -> float:
        """The stream is lost: seconds to wait before the next one, which resumes after the joiner's tokens.

        Raises `error` where nobody may go on.
        """
        budget = self._policy.budget if self.output_tokens else min(self._policy.budget, FIRST_RETRIES)
        if not (has_lost_router(error) and self.tries <= budget and is_continuable(self._num_choices, self.output_tokens)):
            raise error
        pause_s = min(self._policy.max_pause_s, self._policy.first_pause_s * 2.0 ** (self.tries - 1))
        self.tries += 1
        return pause_s * self._rng.uniform(0.5, 1.0)
