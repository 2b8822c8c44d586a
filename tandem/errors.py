"""The error family: every failure a caller can see, with its code, reason and whether trying again can help.

Must not know gRPC or HTTP: `rpc.py` and `http.py` translate.
"""

from collections.abc import Mapping
from enum import StrEnum


class Code(StrEnum):
    """What kind of failure it is; one gRPC status and one HTTP status each."""

    INVALID_ARGUMENT = "invalid_argument"
    NOT_FOUND = "not_found"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    FAILED_PRECONDITION = "failed_precondition"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    ABORTED = "aborted"
    DATA_LOSS = "data_loss"
    UNIMPLEMENTED = "unimplemented"
    INTERNAL = "internal"


class Reason(StrEnum):
    """Why, at low cardinality: a metric label and the `ErrorInfo.reason` on the wire."""

    BAD_FIELD = "bad_field"
    BAD_BYTES = "bad_bytes"
    MESSAGE_TOO_LARGE = "message_too_large"
    PROMPT_TOO_LONG = "prompt_too_long"
    UNKNOWN_MODEL = "unknown_model"
    UNKNOWN_REPLICA = "unknown_replica"
    UNKNOWN_REQUEST = "unknown_request"
    STALE_INCARNATION = "stale_incarnation"
    STALE_EPOCH = "stale_epoch"
    NO_REGISTER = "no_register"
    UNKNOWN_ROUTE = "unknown_route"
    NO_REPLICA = "no_replica"
    DRAINING = "draining"
    MOVED = "moved"
    QUEUE_FULL = "queue_full"
    PREDICTED_LATE = "predicted_late"
    TENANT_QUOTA = "tenant_quota"
    BAD_KEY = "bad_key"
    NOT_OPERATOR = "not_operator"
    DEADLINE = "deadline"
    CLIENT_CANCELLED = "client_cancelled"
    CLIENT_STALLED = "client_stalled"
    WORKER_LOST = "worker_lost"
    CONNECTION_LOST = "connection_lost"
    ENGINE_FAILED = "engine_failed"
    PROTOCOL = "protocol"
    CONFIG = "config"
    MISSING_PACKAGE = "missing_package"
    NO_ROOM = "no_room"
    PORT_IN_USE = "port_in_use"
    BAD_MODEL = "bad_model"
    START_FAILED = "start_failed"
    NOT_BUILT = "not_built"
    BUG = "bug"


class TandemError(Exception):
    """Base of all errors of ours.

    `message` is for people and names field and limit; `reason` is for programs. `field` names the request field at fault.
    `retry_after_s` is set where a wait helps.
    """

    def __init__(
        self,
        message: str,
        *,
        code: Code,
        reason: Reason,
        retryable: bool = False,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.retryable = retryable
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequestError(TandemError):
    """The request cannot be served as it is; `field` says which part."""

    def __init__(self, field: str, message: str, *, reason: Reason = Reason.BAD_FIELD) -> None:
        super().__init__(f"{field}: {message}", code=Code.INVALID_ARGUMENT, reason=reason, field=field)


class NotFoundError(TandemError):
    """No such model, replica or stream."""

    def __init__(self, message: str, *, reason: Reason, field: str | None = None) -> None:
        super().__init__(message, code=Code.NOT_FOUND, reason=reason, field=field)


class AuthenticationError(TandemError):
    """The caller gave no API key, or none of a tenant. Never says what it gave."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.UNAUTHENTICATED, reason=Reason.BAD_KEY)


class PermissionDeniedError(TandemError):
    """The caller's tenant may not do this."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.PERMISSION_DENIED, reason=Reason.NOT_OPERATOR)


class OverloadedError(TandemError):
    """Refused because of load; come back after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float | None, reason: Reason = Reason.QUEUE_FULL) -> None:
        super().__init__(message, code=Code.RESOURCE_EXHAUSTED, reason=reason, retryable=True, retry_after_s=retry_after_s)


class MessageTooLargeError(TandemError):
    """A message is larger than its limit; sending it again will not help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.RESOURCE_EXHAUSTED, reason=Reason.MESSAGE_TOO_LARGE)


class UnavailableError(TandemError):
    """Nobody can serve this now; safe to try again."""

    def __init__(self, message: str, *, reason: Reason, retry_after_s: float | None = None) -> None:
        super().__init__(message, code=Code.UNAVAILABLE, reason=reason, retryable=True, retry_after_s=retry_after_s)


class DeadlineError(TandemError):
    """The request's deadline passed at `stage` (None: the caller's clock ran out first)."""

    stage: str | None = None

    def __init__(self, stage: str) -> None:
        super().__init__(f"deadline exceeded while in stage {stage}", code=Code.DEADLINE_EXCEEDED, reason=Reason.DEADLINE)
        self.stage = stage


class CancelledRequestError(TandemError):
    """The caller went away, or does not read any more."""

    def __init__(self, message: str = "cancelled by the caller", *, reason: Reason = Reason.CLIENT_CANCELLED) -> None:
        super().__init__(message, code=Code.CANCELLED, reason=reason)


class ConfigError(TandemError):
    """A setting, a folder, a port or a package is not as it must be; the message says what to do."""

    def __init__(self, message: str, *, reason: Reason = Reason.CONFIG) -> None:
        super().__init__(message, code=Code.FAILED_PRECONDITION, reason=reason)


class PreconditionError(TandemError):
    """The parts do not fit together (incarnation, namespace, role)."""

    def __init__(self, message: str, *, reason: Reason) -> None:
        super().__init__(message, code=Code.FAILED_PRECONDITION, reason=reason)


class NotBuiltError(TandemError):
    """On the wire, not served yet."""

    def __init__(self, method: str) -> None:
        super().__init__(f"{method} is not served", code=Code.UNIMPLEMENTED, reason=Reason.NOT_BUILT)


class EngineError(TandemError):
    """The engine failed this request or died; another worker can continue it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.UNAVAILABLE, reason=Reason.ENGINE_FAILED, retryable=True)


class ProtocolError(TandemError):
    """A peer broke the rules of a stream: a gap, a repeat, a missing end."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.INTERNAL, reason=Reason.PROTOCOL)


class InternalError(TandemError):
    """A bug of ours, reported instead of hidden."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=Code.INTERNAL, reason=Reason.BUG)


_CLASSES: Mapping[Code, type[TandemError]] = {
    Code.INVALID_ARGUMENT: InvalidRequestError,
    Code.NOT_FOUND: NotFoundError,
    Code.UNAUTHENTICATED: AuthenticationError,
    Code.PERMISSION_DENIED: PermissionDeniedError,
    Code.RESOURCE_EXHAUSTED: OverloadedError,
    Code.UNAVAILABLE: UnavailableError,
    Code.DEADLINE_EXCEEDED: DeadlineError,
    Code.CANCELLED: CancelledRequestError,
    Code.FAILED_PRECONDITION: PreconditionError,
    Code.UNIMPLEMENTED: NotBuiltError,
    Code.INTERNAL: InternalError,
}
# Codes that more than one class uses: these reasons decide.
_CLASSES_BY_REASON: Mapping[tuple[Code, Reason], type[TandemError]] = {
    (Code.RESOURCE_EXHAUSTED, Reason.MESSAGE_TOO_LARGE): MessageTooLargeError,
    (Code.UNAVAILABLE, Reason.ENGINE_FAILED): EngineError,
    (Code.FAILED_PRECONDITION, Reason.CONFIG): ConfigError,
    (Code.FAILED_PRECONDITION, Reason.MISSING_PACKAGE): ConfigError,
    (Code.FAILED_PRECONDITION, Reason.NO_ROOM): ConfigError,
    (Code.FAILED_PRECONDITION, Reason.PORT_IN_USE): ConfigError,
    (Code.FAILED_PRECONDITION, Reason.BAD_MODEL): ConfigError,
    (Code.FAILED_PRECONDITION, Reason.START_FAILED): ConfigError,
    (Code.INTERNAL, Reason.PROTOCOL): ProtocolError,
}


def rebuild(
    message: str,
    *,
    code: Code,
    reason: Reason,
    retryable: bool = False,
    field: str | None = None,
    retry_after_s: float | None = None,
    stage: str | None = None,
) -> TandemError:
    """An error that another process raised, as the class its code and reason name; the message stays word for word.

    A code without a class of its own gives a plain TandemError. `stage` is kept by DeadlineError only.
    """
    kind = _CLASSES_BY_REASON.get((code, reason)) or _CLASSES.get(code, TandemError)
    error = kind.__new__(kind)
    TandemError.__init__(error, message, code=code, reason=reason, retryable=retryable, field=field, retry_after_s=retry_after_s)
    if stage is not None and isinstance(error, DeadlineError):
        error.stage = stage
    return error
