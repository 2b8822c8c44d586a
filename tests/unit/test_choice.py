"""One choice of a stream, with a text in which token 7 is the word "w7 "."""

import pytest

from decode_workers.choice import Choice, first_output
from tandem.domain import Chunk, FinishReason, Sampling
from tandem.engine.base import EngineOutput
from tandem.errors import EngineError
from tests.fake_engine import EOS, WordText, logprobs_of


def choice_of(sampling: Sampling | None = None, *, resumed: tuple[int, ...] = (), max_output_tokens: int = 100, index: int = 0) -> Choice:
    text = WordText(sampling or Sampling())
    text.add(resumed, is_stop_token=False)
    text.take(is_finished=False)
    return Choice(index, text, position=len(resumed), max_output_tokens=max_output_tokens)


def output(
    *token_ids: int, finish_reason: FinishReason | None = None, stop_reason: str | None = None, with_logprobs: bool = False
) -> EngineOutput:
    return EngineOutput(
        choice_index=0,
        token_ids=token_ids,
        logprobs=tuple(map(logprobs_of, token_ids)) if with_logprobs else (),
        finish_reason=finish_reason,
        stop_reason=stop_reason,
    )


def test_tokens_are_numbered_from_zero_whatever_their_grouping() -> None:
    choice = choice_of()
    assert choice.add(output(5)) == Chunk(first_position=0, token_ids=(5,), text="w5 ")
    assert choice.add(output(6, 7)) == Chunk(first_position=1, token_ids=(6, 7), text="w6 w7 ")
    assert choice.add(output(8)) == Chunk(first_position=3, token_ids=(8,), text="w8 ")
    assert choice.position == 4
    assert choice.finish_reason is None


def test_positions_and_text_go_on_after_resumed_tokens() -> None:
    choice = choice_of(resumed=(5, 6))
    assert choice.add(output(7)) == Chunk(first_position=2, token_ids=(7,), text="w7 ")


def test_the_choice_says_which_one_it_is() -> None:
    assert choice_of(index=3).add(output(5)).choice_index == 3


def test_logprobs_go_with_their_tokens() -> None:
    assert choice_of().add(output(5, 6, with_logprobs=True)).logprobs == (logprobs_of(5), logprobs_of(6))


def test_tokens_after_a_stop_string_are_trimmed_with_text_and_logprobs() -> None:
    choice = choice_of(Sampling(stop=("w7",)))
    chunk = choice.add(output(5, 7, 8, with_logprobs=True))
    assert chunk == Chunk(
        first_position=0,
        token_ids=(5, 7),
        text="w5 ",
        logprobs=(logprobs_of(5), logprobs_of(7)),
        finish_reason=FinishReason.STOP,
        stop_reason="w7",
    )
    assert choice.position == 2
    assert choice.finish_reason is FinishReason.STOP


def test_a_stop_string_may_begin_in_resumed_tokens() -> None:
    chunk = choice_of(Sampling(stop=("5 w6",)), resumed=(4, 5)).add(output(6, 7))
    assert (chunk.first_position, chunk.token_ids, chunk.stop_reason) == (2, (6,), "5 w6")


def test_text_that_may_become_a_stop_string_is_held_back_until_it_cannot() -> None:
    choice = choice_of(Sampling(stop=("6 w9",)))
    assert choice.add(output(6)).text == ""
    assert choice.add(output(7)).text == "w6 "
    assert choice.add(output(8, finish_reason=FinishReason.LENGTH)).text == "w7 w8 "


def test_a_stop_token_ends_the_choice_without_text() -> None:
    chunk = choice_of().add(output(5, EOS, finish_reason=FinishReason.STOP, stop_reason="0"))
    assert chunk == Chunk(first_position=0, token_ids=(5, EOS), text="w5 ", finish_reason=FinishReason.STOP, stop_reason="0")


def test_a_stop_string_wins_over_the_length_limit() -> None:
    chunk = choice_of(Sampling(stop=("w6",)), max_output_tokens=2).add(output(5, 6, finish_reason=FinishReason.LENGTH))
    assert (chunk.finish_reason, chunk.stop_reason) == (FinishReason.STOP, "w6")


def test_the_length_limit_counts_resumed_tokens() -> None:
    choice = choice_of(resumed=(5, 6), max_output_tokens=4)
    assert choice.add(output(7)).finish_reason is None
    assert choice.add(output(8)).finish_reason is FinishReason.LENGTH
    assert choice.finish_reason is FinishReason.LENGTH


def test_a_first_tokens_length_limit_is_no_end() -> None:
    first = output(5, finish_reason=FinishReason.LENGTH, with_logprobs=True)
    assert first_output(first) == output(5, with_logprobs=True)


def test_a_first_tokens_stop_is_the_end() -> None:
    first = output(EOS, finish_reason=FinishReason.STOP)
    assert first_output(first) is first


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_an_aborted_run_is_an_error_that_another_worker_can_make_good(reason: FinishReason) -> None:
    choice = choice_of()
    with pytest.raises(EngineError, match=reason) as caught:
        choice.add(output(5, finish_reason=reason))
    assert caught.value.retryable
    assert choice.position == 0
