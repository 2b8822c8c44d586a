"""Waiting by looking: what counts as an answer."""

import pytest

from tandem.polling import poll_until


@pytest.mark.parametrize("answer", [0, "", (), 7, True])
async def test_an_answer_is_anything_but_none_and_false(answer: object) -> None:
    answers = iter([None, False, answer])
    assert await poll_until(lambda: next(answers), 0.0) == answer
