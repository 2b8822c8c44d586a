"""The asyncio client. Its blocking twin is in `sync_client.py`; all they share does no I/O and stands in other files."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from random import Random
from types import TracebackType
from typing import Self, Unpack

import grpc.aio
from google.protobuf.message import Message

from tandem.api_key import key_metadata
from tandem.chunk_reader import (
    DEFAULT_TIMEOUT_S,
    DRAIN_REPLICA,
    EXPLAIN,
    GENERATE,
    GET_STATUS,
    LIST_MODELS,
    QUERY_TIMEOUT_S,
    SET_TARGET,
    ChunkReader,
)
from tandem.cluster_view import ClusterStatus, ModelCard, models_from_pb, status_from_pb, targets_to_pb
from tandem.completion import Completion, assemble
from tandem.domain import Chunk, Receipt, ReplicaTarget
from tandem.endpoint import resolve_endpoint
from tandem.errors import CancelledRequestError, ConfigError, TandemError
from tandem.explanation import Explanation, explanation_from_pb
from tandem.generate_request import GenerateOptions, PreparedRequest, Prompt, check_timeout_s, prepare_request
from tandem.router_channels import RouterChannels
from tandem.rpc import M, ResponseStream, call, open_client_channel, start_stream
from tandem.v1 import control_pb2, inference_pb2, router_pb2


class AsyncTokenStream:
    """The chunks of one request, in order, without gap or repeat. The call starts at the first read.

    A stream that is lost with its router goes on from its last token through another one, or the same once it is back.
    Iterate it once. Leaving the loop early, `aclose()` and the end of `async with` all cancel the request, and the cluster frees what
    it held. `anext(stream)` reads one chunk and cancels nothing.
    """

    def __init__(self, request: PreparedRequest, client: "AsyncClient") -> None:
        self._reader = ChunkReader(request, client.rng)
        self._client = client
        self._response: ResponseStream | None = None
        self._is_closed = False
        self._has_ended = False

    @property
    def receipt(self) -> Receipt | None:
        """What the request cost and where it went; None before the stream's good end, or where the server sent none."""
        return self._reader.receipt

    async def __anext__(self) -> Chunk:
        """The next chunk; raises the TandemError that ended the stream, ProtocolError where tokens are missing or repeated."""
        if self._has_ended:
            raise StopAsyncIteration
        if self._is_closed:
            raise CancelledRequestError("the stream was closed before its end")
        try:
            while True:
                try:
                    if self._response is None:
                        self._response = self._client.start(self._reader.message(), self._reader.timeout_s())
                    payload = await self._response.read()
                    if payload is not None:
                        await self._client.learn(self._response)
                        return self._reader.read(payload)
                    self._reader.end(await self._response.receipt())
                    break
                except TandemError as error:
                    pause_s = self._after_loss(error)
                    if pause_s is None:
                        break
                    await asyncio.sleep(pause_s)
                    if self._is_closed:  # meanwhile, by another task
                        raise
        except (TandemError, asyncio.CancelledError):
            self._cancel()
            raise
        self._has_ended = True
        raise StopAsyncIteration

    def _after_loss(self, error: TandemError) -> float | None:
        """Seconds until the request goes on; None where all of it came. Raises `error` where it cannot go on."""
        if self._is_closed or self._client.is_closed or self._response is None:
            raise error
        pause_s = self._reader.lost(error)
        self._response.cancel()
        self._response = None
        self._client.lost()
        return pause_s

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        try:
            while True:
                try:
                    chunk = await self.__anext__()
                except StopAsyncIteration:
                    return
                yield chunk
        finally:
            self._cancel()

    async def aclose(self) -> None:
        """Cancels the request where it still runs."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cancel()

    def _cancel(self) -> None:
        self._is_closed = True
        if self._response is not None:
            self._response.cancel()


class AsyncClient:
    """Sends prompts to a Tandem cluster. One client is enough for a process; it belongs to the event loop of its first call.

    `endpoint` is a router's host:port, or several with commas between them; without it TANDEM_ENDPOINT, then the cluster that
    `tandem up` started. Where a router is lost, its requests go on through another of these, or one that it told of. `timeout_s` is the
    default deadline of a whole request in seconds; None for none. `api_key`, else TANDEM_API_KEY, says which tenant the caller is.
    Raises ConfigError where there is no endpoint.

    Every failure is a TandemError: InvalidRequestError (before anything is sent where that can be known), NotFoundError,
    OverloadedError (see `retry_after_s`), MessageTooLargeError, UnavailableError, DeadlineError, CancelledRequestError, EngineError,
    AuthenticationError, PermissionDeniedError.

        async with AsyncClient() as client:
            async with client.stream("Once upon a time", max_tokens=32, temperature=0) as stream:
                async for chunk in stream:
                    print(chunk.text, end="")
            print(stream.receipt.ttft_s)
    """

    def __init__(self, endpoint: str | None = None, *, timeout_s: float | None = DEFAULT_TIMEOUT_S, api_key: str | None = None) -> None:
        self.endpoint = resolve_endpoint(endpoint)
        self._metadata = key_metadata(api_key)
        self._timeout_s = check_timeout_s(timeout_s)
        self._channels = RouterChannels(self.endpoint, open_client_channel)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_closed = False
        self.rng = Random()  # of pauses

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncTokenStream:
        """The request's chunks as they come. `prompt` is text, token ids, or chat messages ({"role": ..., "content": ...}).

        Options are those of `GenerateOptions`. Raises InvalidRequestError at once for what can be known here, TypeError for an
        unknown option; reading the stream raises the rest.
        """
        return self._stream(prepare_request(prompt, options, self._timeout_s))

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole output at once; takes and raises what `stream` does.

        completion = await client.generate([{"role": "user", "content": "Hello"}], max_tokens=16)
        """
        request = prepare_request(prompt, options, self._timeout_s)
        async with self._stream(request) as stream:
            chunks = [chunk async for chunk in stream]
        return assemble(chunks, num_choices=request.num_choices, receipt=stream.receipt)

    async def models(self, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> tuple[ModelCard, ...]:
        """The models served; within `timeout_s` seconds."""
        request, answer = inference_pb2.ListModelsRequest(), inference_pb2.ListModelsResponse
        return models_from_pb(await self._ask(LIST_MODELS, request, answer, timeout_s))

    async def status(self, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> ClusterStatus:
        """The replicas, their state and load; within `timeout_s` seconds."""
        request, answer = control_pb2.GetStatusRequest(), control_pb2.GetStatusResponse
        return status_from_pb(await self._ask(GET_STATUS, request, answer, timeout_s))

    async def explain(self, request_id: str, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> Explanation:
        """Why a request of late went where it went, by any id that its caller saw.

        Raises NotFoundError where the router asked, one of them, does not remember it.
        """
        request, answer = router_pb2.ExplainRequest(request_id=request_id), router_pb2.ExplainResponse
        return explanation_from_pb(await self._ask(EXPLAIN, request, answer, timeout_s))

    async def scale(self, targets: Sequence[ReplicaTarget], *, timeout_s: float | None = QUERY_TIMEOUT_S) -> None:
        """Sets replica counts by hand, until each expires; a negative count gives the pool back. Raises NotFoundError."""
        request, answer = targets_to_pb(targets), control_pb2.SetTargetResponse
        await self._ask(SET_TARGET, request, answer, timeout_s)

    async def drain(self, replica_id: str, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> None:
        """Has a replica take nothing new; once it is idle another one replaces it. Raises NotFoundError."""
        request, answer = control_pb2.DrainReplicaRequest(replica_id=replica_id), control_pb2.DrainReplicaResponse
        await self._ask(DRAIN_REPLICA, request, answer, timeout_s)

    async def close(self) -> None:
        """Cancels what still runs and frees the connection; the client is of no use after it."""
        self.is_closed = True
        for channel in self._channels.opened:
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def start(self, message: inference_pb2.GenerateRequest, timeout_s: float | None) -> ResponseStream:
        """For its streams: begins one."""
        return start_stream(self._open(), GENERATE, message, timeout_s=timeout_s, metadata=self._metadata)

    async def learn(self, response: ResponseStream) -> None:
        """For its streams: `response` has begun, and says who the routers are."""
        if self._channels.wants_to_learn:
            self._channels.learn(await response.routers())

    def lost(self) -> None:
        """For its streams: one was lost with its router."""
        self._channels.lost()

    def _stream(self, request: PreparedRequest) -> AsyncTokenStream:
        return AsyncTokenStream(request, self)

    async def _ask(self, method: str, request: Message, answer: type[M], timeout_s: float | None) -> M:
        return await call(self._open(), method, request, answer, timeout_s=check_timeout_s(timeout_s), metadata=self._metadata)

    def _open(self) -> grpc.aio.Channel:
        """The connection, made at the first call, because grpc binds it to the running loop."""
        if self.is_closed:
            raise ConfigError("the client is closed: make a new one")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif loop is not self._loop:
            raise ConfigError("an AsyncClient belongs to the event loop of its first call: make one for each loop")
        return self._channels.current
