"""Tandem: serve large language models with prefill and decode on separate workers. This is what users import.

Must import neither an engine nor a store, and the gRPC clients only when they are asked for.
"""

from typing import TYPE_CHECKING

from tandem.domain import (
    Chunk,
    FinishReason,
    Logprobs,
    Receipt,
    ReplicaTarget,
    Role,
    Sampling,
    Slo,
    StructuredKind,
    StructuredOutput,
    TokenLogprob,
    Usage,
)
from tandem.errors import (
    AuthenticationError,
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
    PermissionDeniedError,
    PreconditionError,
    ProtocolError,
    Reason,
    TandemError,
    UnavailableError,
)

if TYPE_CHECKING:
    from tandem.client import AsyncClient, AsyncTokenStream
    from tandem.completion import Choice, Completion
    from tandem.sync_client import Client, TokenStream

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncTokenStream",
    "AuthenticationError",
    "CancelledRequestError",
    "Choice",
    "Chunk",
    "Client",
    "Code",
    "Completion",
    "ConfigError",
    "DeadlineError",
    "EngineError",
    "FinishReason",
    "InternalError",
    "InvalidRequestError",
    "Logprobs",
    "MessageTooLargeError",
    "NotBuiltError",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "PreconditionError",
    "ProtocolError",
    "Reason",
    "Receipt",
    "ReplicaTarget",
    "Role",
    "Sampling",
    "Slo",
    "StructuredKind",
    "StructuredOutput",
    "TandemError",
    "TokenLogprob",
    "TokenStream",
    "UnavailableError",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> object:
    """The clients, imported at their first use: gRPC takes 0.2 s and must not start before a replica's engine does."""
    if name in ("AsyncClient", "AsyncTokenStream"):
        from tandem import client

        return getattr(client, name)
    if name in ("Client", "TokenStream"):
        from tandem import sync_client

        return getattr(sync_client, name)
    if name in ("Choice", "Completion"):
        from tandem import completion

        return getattr(completion, name)
    raise AttributeError(f"module 'tandem' has no attribute {name!r}")
