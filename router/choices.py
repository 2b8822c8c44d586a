"""A request for several choices as so many requests for one, so that each is handed off, moved and continued like any other.

Must not relay by itself. The first choice goes ahead; the others follow its first token, when the prompt's blocks are known to be there.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from router.relay import Relay, TokenSink
from tandem.deadline import Deadline
from tandem.domain import MAX_REQUEST_ID_CHARS, BlockHash, Receipt, Request, RequestId
from tandem.errors import TandemError
from tandem.rpc import parse_answer
from tandem.v1 import inference_pb2


class MakeRelay(Protocol):
    """How one request for one choice is served."""

    def __call__(self, sink: TokenSink, request: Request) -> Relay:
        """A relay that writes to the sink."""


class Choices:
    """Serves one request on one call, whatever its number of choices."""

    def __init__(self, sink: TokenSink, request: Request, make_relay: MakeRelay) -> None:
        self._sink = sink
        self._request = request
        choices = request.sampling.n
        self._messages: asyncio.Queue[inference_pb2.GenerateResponse | None] = asyncio.Queue(maxsize=choices)
        self._has_begun = asyncio.Event()
        self._output_tokens = 0  # of the choices that have ended
        if choices == 1:
            self._relays = [make_relay(sink, request)]
        else:
            self._relays = [make_relay(_ChoiceSink(self._take, index), _one_choice(request, index)) for index in range(choices)]

    @property
    def sent_tokens(self) -> int:
        """Output tokens passed on, of all choices."""
        return sum(relay.sent_tokens for relay in self._relays)

    async def run(self, block_hashes: Sequence[BlockHash], deadline: Deadline) -> Receipt:
        """Streams the tokens of all choices to the call; answers one receipt. Raises the TandemError of the first that fails."""
        if len(self._relays) == 1:
            return await self._relays[0].run(block_hashes, deadline)
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(self._write(), name="choices write")
                first = group.create_task(self._relays[0].run(block_hashes, deadline), name="choice 0")
                first.add_done_callback(lambda _: self._has_begun.set())
                await self._has_begun.wait()
                others = [
                    group.create_task(relay.run(block_hashes, deadline, is_begun=True), name=f"choice {index}")
                    for index, relay in enumerate(self._relays[1:], start=1)
                ]
                receipts = await asyncio.gather(first, *others)
                await self._messages.put(None)
                await writing
        except BaseExceptionGroup as failures:
            error = next((one for one in failures.exceptions if isinstance(one, TandemError)), failures.exceptions[0])
            raise error from failures
        return _merged(self._request, receipts)

    async def _write(self) -> None:
        """The only one that writes to the call. Usage counts the output of the choices that have ended, in the order of what is sent."""
        while (message := await self._messages.get()) is not None:
            if message.HasField("usage"):
                self._output_tokens += message.usage.output_tokens
                message.usage.output_tokens = self._output_tokens
            await self._sink.write(message.SerializeToString())

    async def _take(self, index: int, payload: bytes) -> None:
        """One choice's message, under its own index."""
        message = parse_answer(inference_pb2.GenerateResponse, payload)
        message.choice_index = index
        await self._messages.put(message)
        self._has_begun.set()


class _ChoiceSink:
    """Where one choice's messages go."""

    def __init__(self, take: Callable[[int, bytes], Awaitable[None]], index: int) -> None:
        self._take = take
        self._index = index

    async def write(self, payload: bytes, /) -> None:
        """Passes the message on; waits while the call is behind."""
        await self._take(self._index, payload)


def _one_choice(request: Request, index: int) -> Request:
    """Choice `index` alone. A seed goes up with it, as vLLM's own choices have it (ParentRequest)."""
    seed = request.sampling.seed
    sampling = replace(request.sampling, n=1, seed=None if seed is None else seed + index)
    suffix = f"#{index}"
    return replace(request, request_id=RequestId(request.request_id[: MAX_REQUEST_ID_CHARS - len(suffix)] + suffix), sampling=sampling)


def _merged(request: Request, receipts: Sequence[Receipt]) -> Receipt:
    """The first choice's receipt with the work of all."""
    first = receipts[0]
    return replace(
        first,
        request_id=request.request_id,
        e2e_s=max(receipt.e2e_s for receipt in receipts),
        output_tokens=sum(receipt.output_tokens for receipt in receipts),
        decode_recomputed_tokens=sum(receipt.decode_recomputed_tokens for receipt in receipts),
        kv_bytes_shipped=sum(receipt.kv_bytes_shipped for receipt in receipts),
        attempts=max(receipt.attempts for receipt in receipts),
        not_exact=tuple(sorted({name for receipt in receipts for name in receipt.not_exact})),
    )
