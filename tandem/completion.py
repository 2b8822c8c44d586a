"""A finished generation as one value, and its assembly from chunks. Pure: the clients read the stream."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.domain import Chunk, FinishReason, Logprobs, Receipt, Usage
from tandem.errors import ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of the `n` outputs of a request. `logprobs` are in nats, one entry a token, empty where none were asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish_reason: FinishReason
    stop_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What `generate` answers. The properties are the first choice's; with n > 1 look into `choices`.

    Text and tokens are those this call generated: resumed tokens are not among them. `usage` counts all choices together.
    `receipt` says what the request cost and where it went; None where the server sent none.
    """

    choices: tuple[Choice, ...]
    usage: Usage | None
    receipt: Receipt | None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first choice's output tokens."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[Logprobs, ...]:
        """The first choice's log probabilities."""
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> str | None:
        """The stop string or stop token id (in decimal) that ended the first choice."""
        return self.choices[0].stop_reason


def assemble(chunks: Sequence[Chunk], *, num_choices: int, receipt: Receipt | None) -> Completion:
    """The completion of a stream's chunks, which the joiner has found complete and in order.

    Raises ProtocolError where a choice has no finish reason. O(chunks x choices).
    """
    choices = tuple(_choice(index, [chunk for chunk in chunks if chunk.choice_index == index]) for index in range(num_choices))
    return Completion(choices=choices, usage=_usage(chunks, choices), receipt=receipt)


def _choice(index: int, chunks: Sequence[Chunk]) -> Choice:
    last = chunks[-1] if chunks else None
    if last is None or last.finish_reason is None:
        raise ProtocolError(f"the stream ended without a finish reason for choice {index}")
    return Choice(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def _usage(chunks: Sequence[Chunk], choices: Sequence[Choice]) -> Usage | None:
    """The server's count; with several choices, each of which brings its own, the tokens that came."""
    last = next((chunk.usage for chunk in reversed(chunks) if chunk.usage is not None), None)
    if last is None or len(choices) == 1:
        return last
    output_tokens = sum(len(choice.token_ids) for choice in choices)
    return Usage(prompt_tokens=last.prompt_tokens, output_tokens=output_tokens, cached_tokens=last.cached_tokens)
