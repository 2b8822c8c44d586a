"""Resumed tokens go through a request's grammar once, before the scheduler may take the request up: vLLM's types, no engine."""

from concurrent.futures import Future
from typing import Any

import pytest

from tests.seam_parts import seam_parts

pytestmark = pytest.mark.integration


@pytest.fixture
def parts() -> Any:
    return seam_parts()


class RecordingGrammar:
    """Takes tokens below 10."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.taken += tokens
        return all(token < 10 for token in tokens)


def make_request(parts: Any, grammar: Any, resumed_tokens: int, tokens: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Any:
    params = parts.SamplingParams(
        max_tokens=5, structured_outputs=parts.StructuredOutputsParams(regex="a*"), extra_args={parts.RESUMED_TOKENS: resumed_tokens}
    )
    request = parts.Request(request_id="r", prompt_token_ids=list(tokens), sampling_params=params, pooling_params=None)
    assert request.structured_output_request is not None
    request.structured_output_request.grammar = grammar
    return request


def state(request: Any) -> Any:
    assert request.structured_output_request is not None
    return request.structured_output_request


def test_the_grammar_is_ready_only_once_it_has_the_resumed_tokens(parts: Any) -> None:
    compiling: Future[Any] = Future()
    request = make_request(parts, compiling, 2)
    parts.prepare(request, owns_draws=True)
    assert not state(request).is_grammar_ready
    grammar = RecordingGrammar()
    compiling.set_result(grammar)
    assert state(request).is_grammar_ready
    assert state(request).grammar is grammar
    assert grammar.taken == [4, 5]


def test_a_grammar_that_is_there_already_takes_them_at_once(parts: Any) -> None:
    done: Future[Any] = Future()
    done.set_result(RecordingGrammar())
    for compiled in (done, RecordingGrammar()):
        request = make_request(parts, compiled, 3)
        parts.prepare(request, owns_draws=True)
        assert state(request).grammar.taken == [3, 4, 5]


def test_a_request_that_continues_nothing_keeps_its_grammar_as_it_is(parts: Any) -> None:
    compiling: Future[Any] = Future()
    request = make_request(parts, compiling, 0)
    parts.prepare(request, owns_draws=True)
    grammar = RecordingGrammar()
    compiling.set_result(grammar)
    assert state(request).grammar is grammar
    assert grammar.taken == []


def test_tokens_that_do_not_fit_are_the_request_s_error(parts: Any) -> None:
    for already in (True, False):
        compiled: Future[Any] = Future()
        if already:
            compiled.set_result(RecordingGrammar())
        request = make_request(parts, compiled, 2, (1, 2, 99))
        parts.prepare(request, owns_draws=True)
        if not already:
            compiled.set_result(RecordingGrammar())
        assert isinstance(state(request).grammar, ValueError)


def test_a_grammar_that_does_not_compile_stays_the_request_s_error(parts: Any) -> None:
    compiling: Future[Any] = Future()
    request = make_request(parts, compiling, 2)
    parts.prepare(request, owns_draws=True)
    compiling.set_exception(RuntimeError("no grammar"))
    assert isinstance(state(request).grammar, RuntimeError)
