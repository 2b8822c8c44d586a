"""A ticket brings news to its call, and breaks off reading when the attempt's worker is lost."""

import asyncio
from typing import cast

import pytest

from router.instructions import Dispatch
from router.ticket import Ticket
from tandem.domain import Plan, PlannedWorker, ReplicaId, RequestId
from tandem.errors import CancelledRequestError, EngineError, Reason, TandemError, UnavailableError
from tandem.rpc import ResponseStream

LOST = EngineError("lost")


class _Stream:
    """Answers what it is given; without an answer it waits to be cancelled."""

    def __init__(self, answer: bytes | TandemError | None = None, *, is_open: bool = False) -> None:
        self._answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        if isinstance(answer, TandemError):
            self._answer.set_exception(answer)
        elif not is_open:
            self._answer.set_result(answer)

    async def read(self) -> bytes | None:
        return await self._answer

    def cancel(self) -> None:
        if not self._answer.done():
            self._answer.set_exception(CancelledRequestError())


def _stream(answer: bytes | TandemError | None = None, *, is_open: bool = False) -> ResponseStream:
    return cast("ResponseStream", _Stream(answer, is_open=is_open))


def _dispatch(attempt: int) -> Dispatch:
    decode = PlannedWorker(replica_id=ReplicaId("d"), incarnation=1, address="d:1")
    return Dispatch(request_id=RequestId("r"), attempt=attempt, plan=Plan(plan_id="p", decode=decode))


async def _ticket(attempt: int = 1) -> Ticket:
    ticket = Ticket(RequestId("r"))
    ticket.tell(_dispatch(attempt))
    assert (await ticket.next_dispatch()).attempt == ticket.attempt == attempt
    return ticket


async def test_dispatches_come_one_after_the_other_and_then_the_end() -> None:
    ticket = await _ticket()
    ticket.tell(_dispatch(2))
    assert (await ticket.next_dispatch()).attempt == 2
    ticket.tell(LOST)
    with pytest.raises(EngineError):
        await ticket.next_dispatch()


async def test_news_for_a_task_that_has_been_cancelled_are_dropped() -> None:
    ticket = Ticket(RequestId("r"))
    task = asyncio.create_task(ticket.next_dispatch())
    await asyncio.sleep(0)
    task.cancel()
    ticket.tell(LOST)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_messages_and_the_end_are_read() -> None:
    ticket = await _ticket()
    assert await ticket.read(_stream(b"x"), 0.0) == b"x"
    assert await ticket.read(_stream(None), 0.0) is None


async def test_the_streams_own_error_is_raised() -> None:
    with pytest.raises(EngineError):
        await (await _ticket()).read(_stream(LOST), 0.0)


async def test_a_loss_breaks_off_the_reading() -> None:
    ticket = await _ticket()
    task = asyncio.create_task(ticket.read(_stream(is_open=True), 0.0))
    await asyncio.sleep(0)
    ticket.abandon(1, LOST)
    with pytest.raises(EngineError):
        await task


async def test_a_loss_before_the_reading_began_ends_it_at_once() -> None:
    ticket = Ticket(RequestId("r"))
    ticket.tell(_dispatch(1))
    ticket.abandon(1, LOST)
    await ticket.next_dispatch()
    with pytest.raises(EngineError):
        await ticket.read(_stream(is_open=True), 0.0)


async def test_a_loss_during_a_write_ends_the_next_reading() -> None:
    ticket = await _ticket()
    await ticket.read(_stream(b"x"), 0.0)
    ticket.abandon(1, LOST)
    with pytest.raises(EngineError):
        await ticket.read(_stream(b"y"), 0.0)


async def test_the_loss_of_an_older_attempt_means_nothing() -> None:
    ticket = await _ticket(attempt=2)
    ticket.abandon(1, LOST)
    assert await ticket.read(_stream(b"x"), 0.0) == b"x"


async def test_a_stream_that_the_worker_cancelled_is_a_lost_worker() -> None:
    ticket = await _ticket()
    with pytest.raises(UnavailableError) as caught:
        await ticket.read(_stream(CancelledRequestError()), 0.0)
    assert caught.value.reason is Reason.WORKER_LOST


async def test_silence_counts_from_the_first_message_on_while_the_next_is_waited_for() -> None:
    ticket = await _ticket()
    begun = asyncio.create_task(ticket.read(_stream(is_open=True), 1.0))
    await asyncio.sleep(0)
    assert not ticket.is_silent_since(100.0)  # nothing has come yet: it may be computing
    begun.cancel()
    await ticket.read(_stream(b"x"), 2.0)
    assert not ticket.is_silent_since(100.0)  # it is the client that is slow
    waiting = asyncio.create_task(ticket.read(_stream(is_open=True), 3.0))
    await asyncio.sleep(0)
    assert not ticket.is_silent_since(2.9)
    assert ticket.is_silent_since(3.1)
    waiting.cancel()
