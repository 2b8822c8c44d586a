"""Every error over a real loopback call, streamed and single, on both kinds of channel."""

from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tandem import rpc, rpc_sync
from tandem.errors import (
    CancelledRequestError,
    Code,
    ConfigError,
    DeadlineError,
    EngineError,
    InternalError,
    InvalidRequestError,
    MessageTooLargeError,
    NotBuiltError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    ProtocolError,
    Reason,
    TandemError,
    UnavailableError,
)
from tandem.v1 import inference_pb2
