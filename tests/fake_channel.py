"""Channels without a network: calls are answered by functions, as a server's handlers are, streams by what a test puts into them."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import cast

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc.aio import Metadata

from tandem.errors import TandemError
from tandem.rpc_status import STATUS_DETAILS_KEY, status_code, to_status, wire_message

Answer = Callable[[bytes], Awaitable[Message]]


class FakeStream:
    """One streaming call: messages as they are put, its good end at None; `was_cancelled` by the caller."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self.was_cancelled = False

    def put(self, message: Message | None) -> None:
        """What the server sends next."""
        self._messages.put_nowait(message)

    async def read(self) -> object:
        message = await self._messages.get()
        return None if message is None else message.SerializeToString()  # gRPC's end is an object of its own; it is no bytes either

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    def cancel(self) -> None:
        self.was_cancelled = True


class FakeChannel:
    """Answers the methods in `answers` ("tandem.v1.Worker/Drain"); what an answer raises arrives as it does over a network.

    `streams` are the streaming calls that were made, the last one last.
    """

    def __init__(self, answers: Mapping[str, Answer] | None = None) -> None:
        self._answers = answers or {}
        self.streams: list[FakeStream] = []
        self.is_closed = False

    def unary_stream(self, path: str, *_: object) -> Callable[..., FakeStream]:
        def begin(payload: bytes, **_: object) -> FakeStream:
            self.streams.append(FakeStream())
            return self.streams[-1]

        return begin

    def unary_unary(self, path: str, *_: object) -> Callable[..., Awaitable[bytes]]:
        async def stub(payload: bytes, **_: object) -> bytes:
            try:
                return (await self._answers[path.removeprefix("/")](payload)).SerializeToString()
            except TandemError as error:
                trailing = Metadata((STATUS_DETAILS_KEY, to_status(error).SerializeToString()))
                raise grpc.aio.AioRpcError(status_code(error), Metadata(), trailing, wire_message(error), "") from error

        return stub

    async def close(self, grace: float | None) -> None:
        self.is_closed = True


def fake_channel(answers: Mapping[str, Answer]) -> grpc.aio.Channel:
    """The same as code under test sees it."""
    return cast("grpc.aio.Channel", FakeChannel(answers))
