"""The one table between our errors and HTTP."""

import math

import pytest

from router.http import http_status, retry_headers, tandem_error_object
from tandem.errors import (
    AuthenticationError,
    CancelledRequestError,
    Code,
    ConfigError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    MessageTooLargeError,
    NotBuiltError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    Reason,
    TandemError,
    UnavailableError,
    rebuild,
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequestError("n", "bad"), 400, "invalid_request_error", "bad_field"),
        (InvalidRequestError("prompt", "long", reason=Reason.PROMPT_TOO_LONG), 400, "invalid_request_error", "context_length_exceeded"),
        (NotFoundError("no", reason=Reason.UNKNOWN_MODEL), 404, "not_found_error", "model_not_found"),
        (OverloadedError("full", retry_after_s=1.0), 429, "rate_limit_error", "rate_limit_exceeded"),
        (MessageTooLargeError("big"), 413, "invalid_request_error", "message_too_large"),
        (UnavailableError("none", reason=Reason.NO_REPLICA), 503, "service_unavailable_error", "no_replica"),
        (DeadlineError("queue"), 504, "timeout_error", "deadline"),
        (ConfigError("no file"), 409, "conflict_error", "config"),
        (CancelledRequestError(), 499, "invalid_request_error", "client_cancelled"),
        (NotBuiltError("x"), 501, "server_error", "not_built"),
        (InternalError("oops"), 500, "server_error", "bug"),
        (AuthenticationError("no"), 401, "authentication_error", "invalid_api_key"),
        (PermissionDeniedError("no"), 403, "permission_error", "not_operator"),
        (OverloadedError("much", retry_after_s=1.0, reason=Reason.TENANT_QUOTA), 429, "rate_limit_error", "rate_limit_exceeded"),
        (rebuild("over", code=Code.ABORTED, reason=Reason.WORKER_LOST), 503, "service_unavailable_error", "worker_lost"),
        (rebuild("bad", code=Code.DATA_LOSS, reason=Reason.PROTOCOL), 500, "server_error", "protocol"),
    ],
)
def test_an_error_has_its_status_type_and_code(error: TandemError, status: int, kind: str, code: str) -> None:
    made = tandem_error_object(error)["error"]
    assert (http_status(error), made["type"], made["code"]) == (status, kind, code)


@pytest.mark.parametrize("code", list(Code))
def test_every_code_has_a_status(code: Code) -> None:
    assert 400 <= http_status(rebuild("x", code=code, reason=Reason.BUG)) < 600


def test_a_field_has_the_name_that_the_client_gave_in_param_and_message() -> None:
    made = tandem_error_object(InvalidRequestError("sampling.top_p", "must be greater than 0"))["error"]
    assert (made["param"], made["message"]) == ("top_p", "top_p: must be greater than 0")
    made = tandem_error_object(NotFoundError("model 'x' is not served", reason=Reason.UNKNOWN_MODEL, field="model"))["error"]
    assert (made["param"], made["message"]) == ("model", "model 'x' is not served")
    assert tandem_error_object(DeadlineError("queue"))["error"]["param"] is None


def test_a_message_that_is_no_unicode_is_reported_all_the_same() -> None:
    assert tandem_error_object(InvalidRequestError("stop", "\ud800"))["error"]["message"] == "stop: ?"


@pytest.mark.parametrize(
    ("wait_s", "headers"),
    [
        (2.5, {"Retry-After": "3", "Retry-After-Ms": "2500"}),
        (0.0, {"Retry-After": "1", "Retry-After-Ms": "1"}),
        (None, {"Retry-After": "1"}),
        (math.inf, {"Retry-After": "1"}),
    ],
)
def test_overload_says_when_to_come_back(wait_s: float | None, headers: dict[str, str]) -> None:
    assert retry_headers(OverloadedError("full", retry_after_s=wait_s)) == headers
    assert retry_headers(UnavailableError("none", reason=Reason.NO_REPLICA, retry_after_s=wait_s)) == headers


def test_other_errors_say_nothing_of_waits() -> None:
    assert retry_headers(DeadlineError("queue")) == {}
