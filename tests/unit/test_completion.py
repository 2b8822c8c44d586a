"""A completion is its chunks, nothing more and nothing less."""

import pytest

from tandem.completion import assemble
from tandem.domain import Chunk, FinishReason, Logprobs, Receipt, RequestId, TokenLogprob, Usage
from tandem.errors import ProtocolError

USAGE = Usage(prompt_tokens=7, output_tokens=3, cached_tokens=2)


def logprob(token_id: int) -> Logprobs:
    return Logprobs(sampled=TokenLogprob(token_id=token_id, logprob=-1.0, rank=1))


def test_text_tokens_and_logprobs_are_joined() -> None:
    receipt = Receipt(request_id=RequestId("r"))
    completion = assemble(
        [
            Chunk(first_position=0, token_ids=(1,), logprobs=(logprob(1),)),
            Chunk(first_position=1, token_ids=(2, 3), text="two", logprobs=(logprob(2), logprob(3))),
            Chunk(first_position=3, text=" three", finish_reason=FinishReason.STOP, stop_reason="END", usage=USAGE),
        ],
        num_choices=1,
        receipt=receipt,
    )
    assert completion.text == "two three"
    assert completion.token_ids == (1, 2, 3)
    assert completion.logprobs == (logprob(1), logprob(2), logprob(3))
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, "END")
    assert completion.usage == USAGE
    assert completion.receipt is receipt


def test_choices_keep_their_order_whatever_order_they_came_in() -> None:
    completion = assemble(
        [
            Chunk(first_position=0, token_ids=(20,), choice_index=1, finish_reason=FinishReason.LENGTH, usage=USAGE),
            Chunk(first_position=0, token_ids=(10, 11), choice_index=0, finish_reason=FinishReason.STOP),
        ],
        num_choices=2,
        receipt=None,
    )
    assert [(choice.index, choice.token_ids) for choice in completion.choices] == [(0, (10, 11)), (1, (20,))]
    assert completion.usage == Usage(prompt_tokens=7, output_tokens=3, cached_tokens=2)


def test_without_usage_there_is_none() -> None:
    completion = assemble([Chunk(first_position=0, finish_reason=FinishReason.ABORT)], num_choices=1, receipt=None)
    assert completion.usage is None
    assert completion.token_ids == ()


@pytest.mark.parametrize("chunks", [[], [Chunk(first_position=0, token_ids=(1,))]])
def test_a_choice_without_an_end_is_a_protocol_error(chunks: list[Chunk]) -> None:
    with pytest.raises(ProtocolError, match="choice 0"):
        assemble(chunks, num_choices=1, receipt=None)
