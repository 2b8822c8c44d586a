"""The joiner takes a stream in whole or not at all."""

from random import Random

import pytest

from tandem.domain import Chunk, FinishReason
from tandem.errors import (
    CancelledRequestError,
    DeadlineError,
    EngineError,
    InvalidRequestError,
    NotBuiltError,
    OverloadedError,
    PreconditionError,
    ProtocolError,
    Reason,
    TandemError,
    UnavailableError,
)
from tandem.session import FIRST_RETRIES, RetryPolicy, Session, StreamJoiner, has_lost_router, has_lost_worker


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


def session(*tokens: int, num_choices: int = 1, budget: int = 8) -> Session:
    made = Session(RetryPolicy(budget=budget, first_pause_s=0.1, max_pause_s=1.0), Random(1), num_choices=num_choices)
    if tokens:
        made.joiner.join(Chunk(first_position=0, token_ids=tokens))
    return made


class TestLosses:
    @pytest.mark.parametrize(
        "error",
        [
            UnavailableError("gone", reason=Reason.CONNECTION_LOST),
            CancelledRequestError("the server ends"),
        ],
    )
    def test_a_lost_router_is_replaced_by_another(self, error: TandemError) -> None:
        assert has_lost_router(error)
        session(5).lost(error)

    @pytest.mark.parametrize(
        "error",
        [
            UnavailableError("none", reason=Reason.NO_REPLICA),
            UnavailableError("tried on three workers", reason=Reason.WORKER_LOST),
            EngineError("tried on three workers"),
            OverloadedError("full", retry_after_s=1.0),
            InvalidRequestError("prompt", "must not be empty"),
            DeadlineError("queue"),
            ProtocolError("a gap"),
        ],
    )
    def test_what_every_router_would_say_is_raised(self, error: TandemError) -> None:
        with pytest.raises(type(error)) as caught:
            session(5).lost(error)
        assert caught.value is error

    def test_the_pauses_grow_and_end_with_the_budget(self) -> None:
        one, error = session(5, budget=6), CancelledRequestError()
        pauses = [one.lost(error) for _ in range(6)]
        for pause_s, most_s in zip(pauses, (0.1, 0.2, 0.4, 0.8, 1.0, 1.0), strict=True):
            assert most_s / 2 <= pause_s <= most_s
        assert one.tries == 7
        with pytest.raises(CancelledRequestError):
            one.lost(error)

    def test_where_nothing_came_it_gives_up_soon(self) -> None:
        one, error = session(), CancelledRequestError()
        for _ in range(FIRST_RETRIES):
            one.lost(error)
        with pytest.raises(CancelledRequestError):
            one.lost(error)

    def test_several_choices_are_not_continued(self) -> None:
        session(num_choices=2).lost(CancelledRequestError())
        with pytest.raises(CancelledRequestError):
            session(5, num_choices=2).lost(CancelledRequestError())

    def test_a_worker_that_failed_is_another_thing_than_a_request_that_did(self) -> None:
        assert has_lost_worker(EngineError("died"))
        assert has_lost_worker(PreconditionError("restarted", reason=Reason.STALE_INCARNATION))
        assert has_lost_worker(NotBuiltError("Worker.Generate"))  # another server has its port now
        assert not has_lost_worker(ProtocolError("gap"))
