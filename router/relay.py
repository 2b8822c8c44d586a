"""One request from submission to receipt: follows the core's dispatches, passes the workers' bytes on, joins attempts by position.

Must not choose workers or re-encode tokens. Whatever way it ends, its ticket is closed and the worker's stream cancelled.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from router.instructions import Dispatch
from router.receipts import Timeline, complete_receipt
from router.shell import RouterShell
from router.ticket import Ticket
from router.workers import Workers
from tandem.convert import chunk_to_pb, finish_reason_from_pb, receipt_from_pb, request_to_worker_pb
from tandem.deadline import Deadline
from tandem.domain import BlockHash, Chunk, EngineInfo, FinishReason, Receipt, Request, Usage
from tandem.errors import CancelledRequestError, EngineError, TandemError
from tandem.rpc import open_stream, parse_answer
from tandem.session import StreamJoiner
from tandem.v1 import common_pb2, inference_pb2

_GENERATE = "tandem.v1.Worker/Generate"
_BROKEN_OFF = (FinishReason.ERROR, FinishReason.ABORT)


class TokenSink(Protocol):
    """Where a request's messages go."""

    async def write(self, payload: bytes, /) -> None:
        """Takes one serialised GenerateResponse; raises CancelledRequestError where its reader has gone."""


class Relay:
    """Serves one request on one call. `arrived_s` is by the shell's clock."""

    def __init__(
        self, shell: RouterShell, workers: Workers, call: TokenSink, request: Request, engine: EngineInfo, *, arrived_s: float
    ) -> None:
        self._shell = shell
        self._workers = workers
        self._call = call
        self._request = request
        self._engine = engine
        self._arrived_s = arrived_s
        self._joiner = StreamJoiner(first_position=len(request.resume_token_ids), num_choices=request.sampling.n)
        self.sent_tokens = 0  # output tokens that this call has passed on
        self._attempts = 0
        self._queue_s = 0.0
        self._waiting_since_s = arrived_s
        self._first_token: tuple[float, int] | None = None  # when, and by which attempt
        self._last_token_s: float | None = None

    async def run(self, block_hashes: Sequence[BlockHash], deadline: Deadline, *, is_begun: bool = False) -> Receipt:
        """Streams the request's tokens to the call; answers the receipt. Raises the TandemError it ends with.

        `is_begun`: output of the call it belongs to has been sent.
        """
        ticket = self._shell.submit(self._request, block_hashes, deadline, is_begun=is_begun)
        try:
            while True:
                dispatch = await ticket.next_dispatch()
                self._note_dispatch()
                try:
                    worker_receipt = await self._attempt(ticket, dispatch, deadline)
                except CancelledRequestError:
                    raise
                except TandemError as error:
                    self._waiting_since_s = self._shell.clock()
                    if not await self._was_all_sent():
                        self._shell.failed(ticket, error)
                        continue
                    worker_receipt = self._bare_receipt(dispatch)  # lost with the worker, after its last token
                receipt = self._receipt(worker_receipt, dispatch)
                self._shell.prefix_used(dispatch.plan, receipt, self._engine.block_size_tokens)
                self._shell.finished(ticket, receipt)
                return receipt
        finally:
            self._shell.close(ticket)

    async def _attempt(self, ticket: Ticket, dispatch: Dispatch, deadline: Deadline) -> Receipt:
        decode = dispatch.plan.decode
        sent = self._joiner.token_ids() if self.sent_tokens else ()  # of the only choice: the core retries several only before the first
        request = replace(self._request, resume_token_ids=(*self._request.resume_token_ids, *sent))
        message = request_to_worker_pb(request, dispatch.plan, dispatch.attempt, decode.incarnation)
        timeout_s = deadline.remaining_s("dispatch")
        async with open_stream(self._workers.channel(decode), _GENERATE, message, timeout_s=timeout_s) as stream:
            while (payload := await ticket.read(stream, self._shell.clock())) is not None:
                await self._forward(payload, ticket)
            self._joiner.end()
            receipt = await stream.receipt()
        if receipt is None:
            return self._bare_receipt(dispatch)
        return receipt_from_pb(parse_answer(common_pb2.Receipt, receipt))

    async def _forward(self, payload: bytes, ticket: Ticket) -> None:
        """Sends one message on as it is, once it is known to continue the stream."""
        message = parse_answer(inference_pb2.GenerateResponse, payload)
        finish_reason = finish_reason_from_pb(message.finish_reason)
        if finish_reason in _BROKEN_OFF:
            raise EngineError(f"the engine broke the request off ({finish_reason})")
        token_ids = tuple(message.token_ids)
        self._joiner.join(
            Chunk(
                first_position=message.first_position,
                token_ids=token_ids,
                finish_reason=finish_reason,
                choice_index=message.choice_index,
            )
        )
        await self._call.write(payload)
        if token_ids:
            self.sent_tokens += len(token_ids)
            self._last_token_s = self._shell.clock()
            if self._first_token is None:
                self._first_token = (self._last_token_s, self._attempts)
            self._shell.sent(ticket, len(token_ids))

    async def _was_all_sent(self) -> bool:
        """Whether the client has every token although the attempt failed; a missing LENGTH end is sent here."""
        if self._joiner.is_finished:
            return True
        position = self._joiner.next_position()
        if self._request.sampling.n > 1 or position < self._request.max_output_tokens(self._engine):
            return False
        usage = Usage(prompt_tokens=len(self._request.prompt_token_ids), output_tokens=position, cached_tokens=0)
        end = Chunk(first_position=position, finish_reason=FinishReason.LENGTH, usage=usage)
        await self._call.write(chunk_to_pb(end).SerializeToString())
        return True

    def _note_dispatch(self) -> None:
        self._attempts += 1
        if self._first_token is None:
            self._queue_s += self._shell.clock() - self._waiting_since_s

    def _bare_receipt(self, dispatch: Dispatch) -> Receipt:
        return Receipt(
            request_id=self._request.request_id,
            prompt_tokens=len(self._request.prompt_token_ids),
            decode_replica_id=dispatch.plan.decode.replica_id,
        )

    def _receipt(self, worker_receipt: Receipt, dispatch: Dispatch) -> Receipt:
        first_s, first_attempt = (None, None) if self._first_token is None else self._first_token
        timeline = Timeline(
            queue_s=self._queue_s,
            first_token_s=None if first_s is None else first_s - self._arrived_s,
            last_token_s=None if self._last_token_s is None else self._last_token_s - self._arrived_s,
            end_s=self._shell.clock() - self._arrived_s,
            sent_tokens=self.sent_tokens,
            output_tokens=self.sent_tokens + len(self._request.resume_token_ids),
            attempts=self._attempts,
            first_token_attempt=first_attempt,
        )
        return complete_receipt(
            worker_receipt,
            timeline,
            dispatch.plan.predicted,
            router_id=self._shell.config.router_id,
            one_worker_reason=dispatch.plan.one_worker_reason,
        )
