"""The blocking client: `AsyncClient` without an event loop, on gRPC's own threads. Must not start a loop."""

import threading
from collections.abc import Generator, Sequence
from random import Random
from types import TracebackType
from typing import Self, Unpack

import grpc
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
from tandem.rpc import M, open_sync_client_channel
from tandem.rpc_sync import SyncResponseStream, call_sync, start_stream_sync
from tandem.v1 import control_pb2, inference_pb2, router_pb2


class TokenStream:
    """The chunks of one request, in order, without gap or repeat. The call starts at the first read.

    A stream that is lost with its router goes on from its last token through another one, or the same once it is back.
    Iterate it once. Leaving the loop early, `close()` (from any thread) and the end of `with` all cancel the request, and the cluster
    frees what it held. `next(stream)` reads one chunk and cancels nothing.
    """

    def __init__(self, request: PreparedRequest, client: "Client") -> None:
        self._reader = ChunkReader(request, client.rng)
        self._client = client
        self._response: SyncResponseStream | None = None
        self._closed = threading.Event()
        self._has_ended = False

    @property
    def receipt(self) -> Receipt | None:
        """What the request cost and where it went; None before the stream's good end, or where the server sent none."""
        return self._reader.receipt

    def __next__(self) -> Chunk:
        """The next chunk; raises the TandemError that ended the stream, ProtocolError where tokens are missing or repeated."""
        if self._has_ended:
            raise StopIteration
        if self._closed.is_set():
            raise CancelledRequestError("the stream was closed before its end")
        try:
            while True:
                try:
                    if self._response is None:
                        self._response = self._client.start(self._reader.message(), self._reader.timeout_s())
                        if self._closed.is_set():  # meanwhile, by another thread
                            self._response.cancel()
                    payload = self._response.read()
                    if payload is not None:
                        self._client.learn(self._response)
                        return self._reader.read(payload)
                    self._reader.end(self._response.receipt())
                    break
                except TandemError as error:
                    pause_s = self._after_loss(error)
                    if pause_s is None:
                        break
                    if self._closed.wait(pause_s):
                        raise
        except BaseException:  # a Ctrl-C too must not leave the request running
            self.close()
            raise
        self._has_ended = True
        raise StopIteration

    def _after_loss(self, error: TandemError) -> float | None:
        """Seconds until the request goes on; None where all of it came. Raises `error` where it cannot go on."""
        if self._closed.is_set() or self._client.is_closed or self._response is None:
            raise error
        pause_s = self._reader.lost(error)
        self._response.cancel()
        self._response = None
        self._client.lost()
        return pause_s

    def __iter__(self) -> Generator[Chunk, None, None]:
        try:
            while True:
                try:
                    chunk = self.__next__()
                except StopIteration:
                    return
                yield chunk
        finally:
            self.close()

    def close(self) -> None:
        """Cancels the request where it still runs."""
        self._closed.set()
        response = self._response
        if response is not None:
            response.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Client:
    """Sends prompts to a Tandem cluster and blocks; one client is enough for all threads of a process.

    Arguments and errors are those of `AsyncClient`.

        with Client("127.0.0.1:8470") as client:
            print(client.generate("Once upon a time", max_tokens=32, temperature=0).text)
    """

    def __init__(self, endpoint: str | None = None, *, timeout_s: float | None = DEFAULT_TIMEOUT_S, api_key: str | None = None) -> None:
        self.endpoint = resolve_endpoint(endpoint)
        self._metadata = key_metadata(api_key)
        self._timeout_s = check_timeout_s(timeout_s)
        self._channels = RouterChannels(self.endpoint, open_sync_client_channel)
        self._lock = threading.Lock()  # of the channels: streams of several threads share them
        self.is_closed = False
        self.rng = Random()  # of pauses

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> TokenStream:
        """The request's chunks as they come. `prompt` is text, token ids, or chat messages ({"role": ..., "content": ...}).

        Options are those of `GenerateOptions`. Raises InvalidRequestError at once for what can be known here, TypeError for an
        unknown option; reading the stream raises the rest.
        """
        return self._stream(prepare_request(prompt, options, self._timeout_s))

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole output at once; takes and raises what `stream` does."""
        request = prepare_request(prompt, options, self._timeout_s)
        with self._stream(request) as stream:
            chunks = list(stream)
        return assemble(chunks, num_choices=request.num_choices, receipt=stream.receipt)

    def models(self, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> tuple[ModelCard, ...]:
        """The models served; within `timeout_s` seconds."""
        request, answer = inference_pb2.ListModelsRequest(), inference_pb2.ListModelsResponse
        return models_from_pb(self._ask(LIST_MODELS, request, answer, timeout_s))

    def status(self, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> ClusterStatus:
        """The replicas, their state and load; within `timeout_s` seconds."""
        request, answer = control_pb2.GetStatusRequest(), control_pb2.GetStatusResponse
        return status_from_pb(self._ask(GET_STATUS, request, answer, timeout_s))

    def explain(self, request_id: str, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> Explanation:
        """Why a request of late went where it went, by any id that its caller saw.

        Raises NotFoundError where the router asked, one of them, does not remember it.
        """
        request, answer = router_pb2.ExplainRequest(request_id=request_id), router_pb2.ExplainResponse
        return explanation_from_pb(self._ask(EXPLAIN, request, answer, timeout_s))

    def scale(self, targets: Sequence[ReplicaTarget], *, timeout_s: float | None = QUERY_TIMEOUT_S) -> None:
        """Sets replica counts by hand, until each expires; a negative count gives the pool back. Raises NotFoundError."""
        request, answer = targets_to_pb(targets), control_pb2.SetTargetResponse
        self._ask(SET_TARGET, request, answer, timeout_s)

    def drain(self, replica_id: str, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> None:
        """Has a replica take nothing new; once it is idle another one replaces it. Raises NotFoundError."""
        request, answer = control_pb2.DrainReplicaRequest(replica_id=replica_id), control_pb2.DrainReplicaResponse
        self._ask(DRAIN_REPLICA, request, answer, timeout_s)

    def close(self) -> None:
        """Cancels what still runs and frees the connection; the client is of no use after it."""
        with self._lock:
            self.is_closed = True
            for channel in self._channels.opened:
                channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self, message: inference_pb2.GenerateRequest, timeout_s: float | None) -> SyncResponseStream:
        """For its streams: begins one."""
        return start_stream_sync(self._open(), GENERATE, message, timeout_s=timeout_s, metadata=self._metadata)

    def learn(self, response: SyncResponseStream) -> None:
        """For its streams: `response` has begun, and says who the routers are."""
        if self._channels.wants_to_learn:
            routers = response.routers()
            with self._lock:
                self._channels.learn(routers)

    def lost(self) -> None:
        """For its streams: one was lost with its router."""
        with self._lock:
            self._channels.lost()

    def _stream(self, request: PreparedRequest) -> TokenStream:
        return TokenStream(request, self)

    def _ask(self, method: str, request: Message, answer: type[M], timeout_s: float | None) -> M:
        return call_sync(self._open(), method, request, answer, timeout_s=check_timeout_s(timeout_s), metadata=self._metadata)

    def _open(self) -> grpc.Channel:
        with self._lock:
            if self.is_closed:
                raise ConfigError("the client is closed: make a new one")
            return self._channels.current
