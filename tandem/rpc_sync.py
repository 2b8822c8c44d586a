"""gRPC calls for callers without an event loop: the same bytes, limits and errors as in `rpc.py`."""

from collections.abc import Iterator
from typing import cast

import grpc
from google.protobuf.message import Message

from tandem.rpc import RECEIPT_KEY, ROUTERS_KEY, M, Metadata, from_rpc_error, parse_answer


def call_sync(
    channel: grpc.Channel, method: str, request: Message, response_type: type[M], *, timeout_s: float | None, metadata: Metadata = ()
) -> M:
    """Calls a single-answer method ("tandem.v1.Control/GetStatus"); raises TandemError."""
    stub = channel.unary_unary(f"/{method}", None, None)
    try:
        return parse_answer(response_type, stub(request.SerializeToString(), timeout=timeout_s, metadata=metadata))
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


class SyncResponseStream:
    """The messages of one streaming call as bytes; raises TandemError when it fails. Cancel it, or read it to its end."""

    def __init__(self, stream: "grpc.CallIterator[bytes]") -> None:
        self._stream = stream
        self._messages = cast("Iterator[bytes]", stream)  # it is one; its stub knows only __iter__

    def read(self) -> bytes | None:
        """The next message; None at the stream's good end. Blocks."""
        try:
            return next(self._messages)
        except StopIteration:
            return None
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def cancel(self) -> None:
        """Ends the call at once, from any thread; nothing where it has ended."""
        self._stream.cancel()  # type: ignore[no-untyped-call]  # untyped in grpc-stubs

    def routers(self) -> str:
        """What the server said of the routers, host:port with commas between them; call it once a message has come."""
        found = dict(self._stream.initial_metadata() or ()).get(ROUTERS_KEY, "")
        return found if isinstance(found, str) else ""

    def receipt(self) -> bytes | None:
        """The receipt in the trailing metadata; None where there is none. Blocks until the stream's end."""
        trailing = self._stream.trailing_metadata() or ()
        return next((value for key, value in trailing if key == RECEIPT_KEY and isinstance(value, bytes)), None)


def start_stream_sync(
    channel: grpc.Channel, method: str, request: Message | bytes, *, timeout_s: float | None, metadata: Metadata = ()
) -> SyncResponseStream:
    """Starts a streaming call; the caller must cancel it or read it to its end."""
    payload = request if isinstance(request, bytes) else request.SerializeToString()
    return SyncResponseStream(channel.unary_stream(f"/{method}", None, None)(payload, timeout=timeout_s, metadata=metadata))
