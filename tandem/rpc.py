"""gRPC, both ends: services from descriptors, calls, and the one table between our errors and gRPC status.

Handlers take parsed messages and raise `TandemError`; nothing else in the project names a gRPC status code.
Bytes are parsed here, so that bad bytes are a typed error and a relay can forward them unparsed.
"""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from types import ModuleType
from typing import TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem.deadline import Deadline as Deadline
from tandem.errors import (
    CancelledRequestError,
    ConfigError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    ProtocolError,
    Reason,
    TandemError,
)
from tandem.rpc_status import STATUS_DETAILS_KEY, status_code, to_error, to_status, wire_message

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

MAX_MESSAGE_BYTES = 16 * 2**20
RECEIPT_KEY = "tandem-receipt-bin"
ROUTERS_KEY = "tandem-routers"
_SHUTDOWN_GRACE_S = 2.0
_LAST_WORD_S = 1.0
_UNREAD_BYTES = 256 * 2**10  # of one stream, beyond which its sender waits; gRPC's own measuring goes to several MiB
_MAX_TIMEOUT_S = 1e8  # about three years; gRPC takes what its clock cannot hold for a deadline that is over

_COMMON_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # http_proxy in the environment is not meant for these calls
    ("grpc.max_send_message_length", -1),  # the server's limit answers, with its name in the error
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 400),  # which is also how long a connection may take: a router that hangs takes none
    ("grpc.max_reconnect_backoff_ms", 250),  # a process that died is back in a second
)
_CHANNEL_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _UNREAD_BYTES),
)
# Where an open call is all that can tell that its other end hangs.
_CLIENT_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),  # else a client begins at whichever of its routers another client of the process has open
    ("grpc.keepalive_time_ms", 1_500),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),  # of pings that measure the link: while one is open, none is sent to keep it alive
)


class ServerCall:
    """What a handler may do with its call: write messages, read the time left, set the receipt."""

    def __init__(self, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        self._context = context
        self._trailing: list[tuple[str, bytes]] = []
        self.metadata: dict[str, str] = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}

    async def write(self, message: Message | bytes) -> None:
        """Sends one message of a stream; raises CancelledRequestError where the caller has gone."""
        payload = message if isinstance(message, bytes) else message.SerializeToString()
        try:
            await self._context.write(payload)
        except grpc.aio.UsageError as error:
            raise CancelledRequestError from error

    async def tell_routers(self, addresses: str) -> None:
        """Says who the routers are, before the first message: host:port with commas between them."""
        await self._context.send_initial_metadata(((ROUTERS_KEY, addresses),))

    def time_remaining_s(self) -> float | None:
        """Seconds until the caller's deadline; None where it gave none."""
        remaining_s = self._context.time_remaining()
        # grpc answers a caller without a deadline with "hundreds of years".
        return None if remaining_s is None or remaining_s > 1e8 else max(0.0, remaining_s)

    def set_receipt(self, receipt: Message | bytes) -> None:
        """Puts the receipt into the trailing metadata."""
        payload = receipt if isinstance(receipt, bytes) else receipt.SerializeToString()
        self._trailing.append((RECEIPT_KEY, payload))
        self._context.set_trailing_metadata(tuple(self._trailing))


Handler = Callable[[Message, ServerCall], Awaitable[Message | None]]


def service(proto: ModuleType, name: str, implementation: object) -> "grpc.GenericRpcHandler[bytes, bytes]":
    """Serves the methods of service `name` in the stub module `proto` by `implementation`'s coroutines of the same snake_case names.

    `async def generate(self, request, call: ServerCall) -> None` for streams (it writes to `call`), `-> Response` for single answers.
    Raises ConfigError where a method is missing.
    """
    descriptor = proto.DESCRIPTOR.services_by_name[name]
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {}
    for method in descriptor.methods:
        function = getattr(implementation, _snake_case(method.name), None)
        if function is None:
            raise ConfigError(f"{type(implementation).__name__} does not serve {descriptor.full_name}/{method.name}")
        request_type = GetMessageClass(method.input_type)
        if method.server_streaming:
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(_guard(function, request_type))
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(_guard(function, request_type))
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _guard(function: Handler, request_type: type[Message]) -> Callable[..., Awaitable[bytes | None]]:
    """The one place where deadline, cancel, our errors and bugs become a status."""

    async def handle(payload: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes | None:
        try:
            answer = await function(parse(request_type, payload), ServerCall(context))
            return None if answer is None else answer.SerializeToString()
        except TandemError as error:
            failure = error
        except TimeoutError:
            failure = DeadlineError("server")
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("handler_failed method=%s", function.__name__)
            failure = InternalError(f"{function.__name__} failed; the server's log has the cause")
        trailing = (*(context.trailing_metadata() or ()), (STATUS_DETAILS_KEY, to_status(failure).SerializeToString()))
        with contextlib.suppress(TimeoutError):  # it is sent once the caller has read what lies before it, and need not be waited for
            async with asyncio.timeout(_LAST_WORD_S):
                await context.abort(status_code(failure), wire_message(failure), trailing)
        return None

    return handle


def parse(message_type: type[M], payload: bytes) -> M:
    """Parses bytes; raises InvalidRequestError where they are not such a message (invalid UTF-8 included)."""
    try:
        return message_type.FromString(payload)
    except DecodeError as error:
        raise InvalidRequestError(
            message_type.DESCRIPTOR.name, f"the bytes are no such message or a string is not UTF-8 ({error})", reason=Reason.BAD_BYTES
        ) from error


def parse_answer(message_type: type[M], payload: bytes) -> M:
    """Parses what a server sent; raises ProtocolError where the bytes are not such a message."""
    try:
        return message_type.FromString(payload)
    except DecodeError as error:
        raise ProtocolError(f"the server's answer is no {message_type.DESCRIPTOR.name} ({error})") from error


def from_rpc_error(error: grpc.RpcError) -> TandemError:
    """A failed call, of either kind of channel, as the specific error class that callers catch."""
    trailing = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    return to_error(error.code(), error.details(), dict(trailing))


class Server:
    """A listening gRPC server with health and reflection; `port` is the one it got."""

    def __init__(
        self,
        server: grpc.aio.Server,
        health_servicer: "health.aio.HealthServicer",  # type: ignore[name-defined]  # grpc-stubs has no aio here
        host: str,
        port: int,
    ) -> None:
        self._server = server
        self._health = health_servicer
        self.host = host
        self.port = port

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self.host}:{self.port}"

    async def set_serving(self, is_serving: bool) -> None:
        """What grpc.health.v1 answers for the whole server."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", status)

    async def stop(self, grace_s: float = _SHUTDOWN_GRACE_S) -> None:
        """Refuses new calls, lets running ones end within `grace_s`, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_server(host: str, port: int, services: "Mapping[str, grpc.GenericRpcHandler[bytes, bytes]]") -> Server:
    """Listens on host:port (0: any free port) for `services` by full name.

    Raises ConfigError naming the port where it is taken.
    """
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 500),
            ("grpc.keepalive_permit_without_calls", 1),
        )
    )
    server.add_generic_rpc_handlers(tuple(services.values()))
    health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        bound_port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise ConfigError(f"port {port} on {host} is in use or not allowed: choose another port", reason=Reason.PORT_IN_USE) from error
    await server.start()
    for name in ("", *services):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return Server(server, health_servicer, host, bound_port)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port, or to the first that answers of several with commas between them. Connects by itself. Close it."""
    return grpc.aio.insecure_channel(_target(address), options=_CHANNEL_OPTIONS)


def open_client_channel(address: str) -> grpc.aio.Channel:
    """The same to routers: one that hangs, or that the network cuts off, is given up in a few seconds while a call is open."""
    return grpc.aio.insecure_channel(_target(address), options=_CLIENT_OPTIONS)


def open_sync_client_channel(address: str) -> grpc.Channel:
    """The same for callers without an event loop."""
    return grpc.insecure_channel(_target(address), options=_CLIENT_OPTIONS)


def _target(address: str) -> str:
    """gRPC's own list of addresses, which takes no names: those are looked up here. IPv6 ones go together or not at all."""
    parts = address.split(",")
    if len(parts) == 1:
        return address
    if all(part.startswith("[") for part in parts):
        return f"ipv6:{address}"
    found = []
    for host, _, port in (part.rpartition(":") for part in parts):
        try:
            found.append(f"{socket.gethostbyname(host)}:{port}")
        except (OSError, UnicodeError):
            continue  # the others may be known
    return f"ipv4:{','.join(found)}" if found else parts[0]


Metadata = tuple[tuple[str, str], ...]


async def call(
    channel: grpc.aio.Channel, method: str, request: Message, response_type: type[M], *, timeout_s: float | None, metadata: Metadata = ()
) -> M:
    """Calls a single-answer method ("tandem.v1.Worker/Drain"); raises TandemError."""
    stub = channel.unary_unary(f"/{method}", None, None)
    try:
        return parse_answer(response_type, await stub(request.SerializeToString(), timeout=_grpc_timeout_s(timeout_s), metadata=metadata))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _grpc_timeout_s(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else min(timeout_s, _MAX_TIMEOUT_S)


class ResponseStream:
    """The messages of one streaming call as bytes; raises TandemError when it fails. Cancel it, or read it to its end."""

    def __init__(self, stream: "grpc.aio.UnaryStreamCall[bytes, bytes]") -> None:
        self._stream = stream

    async def read(self) -> bytes | None:
        """The next message; None at the stream's good end."""
        try:
            payload = await self._stream.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise CancelledRequestError("the call was closed while it was read") from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        if isinstance(payload, bytes):
            return payload
        code = await self._stream.code()
        if code is not grpc.StatusCode.OK:
            raise to_error(code, await self._stream.details(), dict(await self._stream.trailing_metadata() or ()))
        return None

    def cancel(self) -> None:
        """Ends the call at once, so that the server frees what it held; nothing where it has ended."""
        self._stream.cancel()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (payload := await self.read()) is not None:
            yield payload

    async def routers(self) -> str:
        """What the server said of the routers, host:port with commas between them; call it once a message has come."""
        found = dict(await self._stream.initial_metadata() or ()).get(ROUTERS_KEY, "")
        return found if isinstance(found, str) else ""

    async def receipt(self) -> bytes | None:
        """The receipt in the trailing metadata, after the end; None where there is none."""
        for key, value in await self._stream.trailing_metadata() or ():
            if key == RECEIPT_KEY and isinstance(value, bytes):
                return value
        return None


def start_stream(
    channel: grpc.aio.Channel, method: str, request: Message | bytes, *, timeout_s: float | None, metadata: Metadata = ()
) -> ResponseStream:
    """Starts a streaming call; the caller must cancel it or read it to its end."""
    payload = request if isinstance(request, bytes) else request.SerializeToString()
    return ResponseStream(channel.unary_stream(f"/{method}", None, None)(payload, timeout=_grpc_timeout_s(timeout_s), metadata=metadata))


@asynccontextmanager
async def open_stream(
    channel: grpc.aio.Channel, method: str, request: Message | bytes, *, timeout_s: float | None, metadata: Metadata = ()
) -> AsyncIterator[ResponseStream]:
    """Starts a streaming call and cancels it on every way out, so that the server frees what it held."""
    stream = start_stream(channel, method, request, timeout_s=timeout_s, metadata=metadata)
    try:
        yield stream
    finally:
        stream.cancel()
