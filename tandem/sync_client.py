"""The blocking client: `AsyncClient` without an event loop, on gRPC's own threads. Must not start a loop."""

from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Self, Unpack

from tandem.chunk_reader import (
    DEFAULT_TIMEOUT_S,
    DRAIN_REPLICA,
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
from tandem.errors import CancelledRequestError, ConfigError
from tandem.generate_request import GenerateOptions, PreparedRequest, Prompt, check_timeout_s, prepare_request
from tandem.rpc import open_sync_channel
from tandem.rpc_sync import SyncResponseStream, call_sync, start_stream_sync
from tandem.v1 import control_pb2, inference_pb2


class TokenStream:
    """The chunks of one request, in order, without gap or repeat. The call starts at the first read.

    Iterate it once. Leaving the loop early, `close()` (from any thread) and the end of `with` all cancel the request, and the cluster
    frees what it held. `next(stream)` reads one chunk and cancels nothing.
    """

    def __init__(self, request: PreparedRequest, start: Callable[[], SyncResponseStream]) -> None:
        self._reader = ChunkReader(request)
        self._start = start
        self._response: SyncResponseStream | None = None
        self._is_closed = False
        self._has_ended = False

    @property
    def receipt(self) -> Receipt | None:
        """What the request cost and where it went; None before the stream's good end, or where the server sent none."""
        return self._reader.receipt

    def __next__(self) -> Chunk:
        """The next chunk; raises the TandemError that ended the stream, ProtocolError where tokens are missing or repeated."""
        if self._has_ended:
            raise StopIteration
        if self._is_closed:
            raise CancelledRequestError("the stream was closed before its end")
        try:
            if self._response is None:
                self._response = self._start()
            payload = self._response.read()
            if payload is not None:
                return self._reader.read(payload)
            self._reader.end(self._response.receipt())
        except BaseException:  # a Ctrl-C too must not leave the request running
            self.close()
            raise
        self._has_ended = True
        raise StopIteration

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
        self._is_closed = True
        if self._response is not None:
            self._response.cancel()

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

    def __init__(self, endpoint: str | None = None, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        self.endpoint = resolve_endpoint(endpoint)
        self._timeout_s = check_timeout_s(timeout_s)
        self._channel = open_sync_channel(self.endpoint)
        self._is_closed = False

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
        self._check_open()
        request, answer = inference_pb2.ListModelsRequest(), inference_pb2.ListModelsResponse
        return models_from_pb(call_sync(self._channel, LIST_MODELS, request, answer, timeout_s=check_timeout_s(timeout_s)))

    def status(self, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> ClusterStatus:
        """The replicas, their state and load; within `timeout_s` seconds."""
        self._check_open()
        request, answer = control_pb2.GetStatusRequest(), control_pb2.GetStatusResponse
        return status_from_pb(call_sync(self._channel, GET_STATUS, request, answer, timeout_s=check_timeout_s(timeout_s)))

    def scale(self, targets: Sequence[ReplicaTarget], *, timeout_s: float | None = QUERY_TIMEOUT_S) -> None:
        """Sets replica counts by hand, until each expires; a negative count gives the pool back. Raises NotFoundError."""
        self._check_open()
        request, answer = targets_to_pb(targets), control_pb2.SetTargetResponse
        call_sync(self._channel, SET_TARGET, request, answer, timeout_s=check_timeout_s(timeout_s))

    def drain(self, replica_id: str, *, timeout_s: float | None = QUERY_TIMEOUT_S) -> None:
        """Has a replica take nothing new; once it is idle another one replaces it. Raises NotFoundError."""
        self._check_open()
        request, answer = control_pb2.DrainReplicaRequest(replica_id=replica_id), control_pb2.DrainReplicaResponse
        call_sync(self._channel, DRAIN_REPLICA, request, answer, timeout_s=check_timeout_s(timeout_s))

    def close(self) -> None:
        """Cancels what still runs and frees the connection; the client is of no use after it."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _stream(self, request: PreparedRequest) -> TokenStream:
        def start() -> SyncResponseStream:
            self._check_open()
            return start_stream_sync(self._channel, GENERATE, request.message, timeout_s=request.timeout_s)

        return TokenStream(request, start)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("the client is closed: make a new one")
