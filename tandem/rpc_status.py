"""The one table between our errors and gRPC status, with google.rpc details, in both directions.

Used by `rpc.py` and `rpc_sync.py` only; must not open calls.
"""

import math
from collections.abc import Mapping

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from tandem.errors import Code, DeadlineError, Reason, TandemError, rebuild

STATUS_DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "tandem"
# The message travels up to three times in the trailing metadata, once with three letters a byte, and gRPC refuses more than 8 KiB.
_MAX_MESSAGE_BYTES = 1_000

# gRPC's number and the HTTP twin stand in reference/peers.md, section 4.3.
_STATUS: Mapping[Code, grpc.StatusCode] = {
    Code.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Code.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Code.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Code.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Code.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Code.CANCELLED: grpc.StatusCode.CANCELLED,
    Code.ABORTED: grpc.StatusCode.ABORTED,
    Code.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    Code.UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
}
# The other way, with what only other servers, proxies and gRPC itself send, and the reason where no Tandem server gave one.
_CODE: Mapping[grpc.StatusCode, tuple[Code, Reason]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (Code.INVALID_ARGUMENT, Reason.BAD_FIELD),
    grpc.StatusCode.OUT_OF_RANGE: (Code.INVALID_ARGUMENT, Reason.BAD_FIELD),
    grpc.StatusCode.NOT_FOUND: (Code.NOT_FOUND, Reason.PROTOCOL),
    grpc.StatusCode.UNAUTHENTICATED: (Code.UNAUTHENTICATED, Reason.PROTOCOL),
    grpc.StatusCode.PERMISSION_DENIED: (Code.PERMISSION_DENIED, Reason.PROTOCOL),
    grpc.StatusCode.FAILED_PRECONDITION: (Code.FAILED_PRECONDITION, Reason.PROTOCOL),
    grpc.StatusCode.ALREADY_EXISTS: (Code.FAILED_PRECONDITION, Reason.PROTOCOL),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (Code.RESOURCE_EXHAUSTED, Reason.PROTOCOL),
    grpc.StatusCode.UNAVAILABLE: (Code.UNAVAILABLE, Reason.CONNECTION_LOST),  # nobody said so: the connection broke, or was never made
    grpc.StatusCode.DEADLINE_EXCEEDED: (Code.DEADLINE_EXCEEDED, Reason.DEADLINE),
    grpc.StatusCode.CANCELLED: (Code.CANCELLED, Reason.CLIENT_CANCELLED),
    grpc.StatusCode.ABORTED: (Code.ABORTED, Reason.PROTOCOL),
    grpc.StatusCode.DATA_LOSS: (Code.DATA_LOSS, Reason.PROTOCOL),
    grpc.StatusCode.UNIMPLEMENTED: (Code.UNIMPLEMENTED, Reason.NOT_BUILT),
    grpc.StatusCode.UNKNOWN: (Code.INTERNAL, Reason.BUG),
    grpc.StatusCode.INTERNAL: (Code.INTERNAL, Reason.PROTOCOL),
}
_RETRYABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED})


def status_code(error: TandemError) -> grpc.StatusCode:
    """The gRPC status of an error of ours."""
    return _STATUS[error.code]


def to_status(error: TandemError) -> status_pb2.Status:
    """Our error as google.rpc.Status with ErrorInfo, and BadRequest, QuotaFailure or RetryInfo where they say more.

    The message is cut to 1,000 bytes and cleaned of what is not UTF-8: a report must never fail.
    """
    message = wire_message(error)
    code: int = _STATUS[error.code].value[0]
    status = status_pb2.Status(code=code, message=message)
    metadata = {"retryable": str(error.retryable).lower()}
    if isinstance(error, DeadlineError) and error.stage is not None:
        metadata["stage"] = error.stage
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason.value.upper(), domain=_DOMAIN, metadata=metadata))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.reason is Reason.TENANT_QUOTA:
        exceeded = error_details_pb2.QuotaFailure.Violation(subject="tenant", description=message)
        status.details.add().Pack(error_details_pb2.QuotaFailure(violations=[exceeded]))
    if error.retry_after_s is not None and math.isfinite(error.retry_after_s):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def wire_message(error: TandemError) -> str:
    """The error's message as it may travel."""
    return error.message[:_MAX_MESSAGE_BYTES].encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore")


def to_error(code: grpc.StatusCode, message: str | None, trailing_metadata: Mapping[str, str | bytes]) -> TandemError:
    """A failed call as the error that was raised at its other end.

    The class, field and waits come from the details where a Tandem server sent them, else from the status alone.
    """
    our_code, reason = _CODE.get(code, (Code.INTERNAL, Reason.PROTOCOL))
    text = message or code.name
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and STATUS_DETAILS_KEY not in trailing_metadata:
        text = "the deadline passed before the answer was complete"  # gRPC's words for it change from call to call
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:  # gRPC's own limit, by its words: it has no other mark
        reason = Reason.MESSAGE_TOO_LARGE
    retryable, field, retry_after_s, stage = code in _RETRYABLE, None, None, None
    for detail in _details(trailing_metadata.get(STATUS_DETAILS_KEY)):
        if isinstance(detail, error_details_pb2.ErrorInfo) and detail.domain == _DOMAIN:
            reason = _REASONS.get(detail.reason, reason)
            retryable, stage = detail.metadata.get("retryable") == "true", detail.metadata.get("stage")
        elif isinstance(detail, error_details_pb2.BadRequest):
            field = next((violation.field for violation in detail.field_violations), None)
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.ToNanoseconds() / 1e9
    return rebuild(text, code=our_code, reason=reason, retryable=retryable, field=field, retry_after_s=retry_after_s, stage=stage)


_REASONS: Mapping[str, Reason] = {reason.value.upper(): reason for reason in Reason}
_DETAIL_TYPES = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)


def _details(payload: str | bytes | None) -> list[Message]:
    """The details of the kinds we know; a peer's damaged ones say nothing rather than hide its error."""
    if not isinstance(payload, bytes):
        return []
    try:
        packed = status_pb2.Status.FromString(payload).details
        return [kind.FromString(detail.value) for detail in packed for kind in _DETAIL_TYPES if detail.Is(kind.DESCRIPTOR)]
    except DecodeError:
        return []
