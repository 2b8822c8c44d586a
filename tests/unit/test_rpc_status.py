"""The table between our errors and gRPC status: both directions, and what happens to damage."""

import math

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

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
    rebuild,
)
from tandem.rpc_status import STATUS_DETAILS_KEY, status_code, to_error, to_status, wire_message

ERRORS: list[TandemError] = [
    InvalidRequestError("sampling.top_p", "must be greater than 0"),
    InvalidRequestError("prompt", "700 tokens, the limit is 512", reason=Reason.PROMPT_TOO_LONG),
    NotFoundError("no model named x", reason=Reason.UNKNOWN_MODEL, field="model"),
    OverloadedError("the queue is full", retry_after_s=1.5),
    OverloadedError("the queue is full", retry_after_s=None),
    MessageTooLargeError("message: 17 MB, the limit is 16 MB"),
    UnavailableError("no replica", reason=Reason.NO_REPLICA, retry_after_s=0.25),
    DeadlineError("queue"),
    CancelledRequestError(),
    *(
        ConfigError("change it", reason=reason)
        for reason in (
            Reason.CONFIG,
            Reason.MISSING_PACKAGE,
            Reason.NO_ROOM,
            Reason.PORT_IN_USE,
            Reason.BAD_MODEL,
            Reason.START_FAILED,
        )
    ),
    PreconditionError("incarnation 3 is not 4", reason=Reason.STALE_INCARNATION),
    NotBuiltError("SetTarget"),
    EngineError("the engine died"),
    ProtocolError("tokens 3 to 4 are missing"),
    InternalError("generate failed"),
    AuthenticationError("who are you"),
    PermissionDeniedError("you may not"),
    OverloadedError("over the quota", retry_after_s=2.5, reason=Reason.TENANT_QUOTA),
    TandemError("no attempts left", code=Code.ABORTED, reason=Reason.WORKER_LOST, retryable=True),
    TandemError("a block is lost", code=Code.DATA_LOSS, reason=Reason.PROTOCOL),
]


def seen(error: TandemError) -> tuple[object, ...]:
    return type(error), str(error), error.code, error.reason, error.retryable, error.field, error.retry_after_s


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{error.reason}")
def test_an_error_comes_back_as_what_it_was(error: TandemError) -> None:
    trailing = {STATUS_DETAILS_KEY: to_status(error).SerializeToString()}
    assert seen(to_error(status_code(error), wire_message(error), trailing)) == seen(error)


def test_the_table_above_has_every_code_and_every_class() -> None:
    assert {error.code for error in ERRORS} == set(Code)
    assert {type(error) for error in ERRORS} == {TandemError, *TandemError.__subclasses__()}


def test_every_code_has_a_status_of_its_own() -> None:
    statuses = {status_code(rebuild("x", code=code, reason=Reason.BUG)) for code in Code}
    assert len(statuses) == len(Code)


def test_the_stage_of_a_deadline_travels() -> None:
    error = to_error(
        grpc.StatusCode.DEADLINE_EXCEEDED, "late", {STATUS_DETAILS_KEY: to_status(DeadlineError("prefill")).SerializeToString()}
    )
    assert isinstance(error, DeadlineError)
    assert error.stage == "prefill"


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (grpc.StatusCode.CANCELLED, CancelledRequestError, Reason.CLIENT_CANCELLED),
        (grpc.StatusCode.UNKNOWN, InternalError, Reason.BUG),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError, Reason.BAD_FIELD),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError, Reason.DEADLINE),
        (grpc.StatusCode.NOT_FOUND, NotFoundError, Reason.PROTOCOL),
        (grpc.StatusCode.ALREADY_EXISTS, PreconditionError, Reason.PROTOCOL),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError, Reason.PROTOCOL),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError, Reason.PROTOCOL),
        (grpc.StatusCode.FAILED_PRECONDITION, PreconditionError, Reason.PROTOCOL),
        (grpc.StatusCode.ABORTED, TandemError, Reason.PROTOCOL),
        (grpc.StatusCode.OUT_OF_RANGE, InvalidRequestError, Reason.BAD_FIELD),
        (grpc.StatusCode.UNIMPLEMENTED, NotBuiltError, Reason.NOT_BUILT),
        (grpc.StatusCode.INTERNAL, ProtocolError, Reason.PROTOCOL),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError, Reason.CONNECTION_LOST),
        (grpc.StatusCode.DATA_LOSS, TandemError, Reason.PROTOCOL),
        (grpc.StatusCode.UNAUTHENTICATED, AuthenticationError, Reason.PROTOCOL),
    ],
)
def test_a_bare_status_has_a_class_too(status: grpc.StatusCode, kind: type[TandemError], reason: Reason) -> None:
    error = to_error(status, "as sent", {})
    assert type(error) is kind
    assert error.reason is reason
    assert error.message == ("as sent" if kind is not DeadlineError else "the deadline passed before the answer was complete")
    assert error.retryable is (status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED))


def test_a_status_without_words_says_its_name() -> None:
    assert to_error(grpc.StatusCode.UNAVAILABLE, None, {}).message == "UNAVAILABLE"


def test_grpc_s_own_message_limit_is_message_too_large() -> None:
    error = to_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (17 vs. 16)", {})
    assert isinstance(error, MessageTooLargeError)
    assert not error.retryable


@pytest.mark.parametrize("payload", [b"\xff\xff", "text", b""])
def test_damaged_details_do_not_hide_the_error(payload: str | bytes) -> None:
    error = to_error(grpc.StatusCode.NOT_FOUND, "no such model", {STATUS_DETAILS_KEY: payload})
    assert type(error) is NotFoundError
    assert error.message == "no such model"


def test_a_damaged_detail_inside_a_good_status_does_not_either() -> None:
    status = status_pb2.Status(code=5)
    status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
    assert type(to_error(grpc.StatusCode.NOT_FOUND, "x", {STATUS_DETAILS_KEY: status.SerializeToString()})) is NotFoundError


def test_reasons_of_other_domains_and_later_versions_are_left_aside() -> None:
    for info in (
        error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="elsewhere"),
        error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="tandem"),
    ):
        status = status_pb2.Status(code=14)
        status.details.add().Pack(info)
        error = to_error(grpc.StatusCode.UNAVAILABLE, "x", {STATUS_DETAILS_KEY: status.SerializeToString()})
        assert error.reason is Reason.CONNECTION_LOST


def test_a_bad_request_without_violations_names_no_field() -> None:
    status = status_pb2.Status(code=3)
    status.details.add().Pack(error_details_pb2.BadRequest())
    assert to_error(grpc.StatusCode.INVALID_ARGUMENT, "x", {STATUS_DETAILS_KEY: status.SerializeToString()}).field is None


def test_a_long_or_broken_message_can_still_travel() -> None:
    status = to_status(InvalidRequestError("prompt", "\ud800" + "x" * 100_000))
    assert len(status.SerializeToString()) < 4_000
    assert status.message.startswith("prompt: ?x")


def test_an_endless_wait_is_no_wait() -> None:
    assert len(to_status(OverloadedError("never", retry_after_s=math.inf)).details) == 1
