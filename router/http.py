"""The router's HTTP endpoint: the server, and the one table between our errors and HTTP.

Must not serve anything by itself: services bring routes. Every error is OpenAI's object {"error": {message, type, param, code}}, with the
status of reference/peers.md, section 4.3; after the first event of a stream it is an event, and the connection ends without [DONE].
Never logs headers or bodies.
"""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from router.access import Access
from router.http_body import MAX_BODY_BYTES
from router.http_calls import HTTP_CALL, HttpCall, HttpCalls
from router.openai_request import body_param, read_request_id
from tandem.errors import Code, ConfigError, InternalError, Reason, TandemError
from tandem.telemetry import RouterMetrics

logger = logging.getLogger(__name__)

_SHUTDOWN_GRACE_S = 2.0
_CLEANUP_S = 0.1
_MAX_PORT = 65_535
_REQUEST_ID = "x-request-id"
_WITH_KEY = "/v1/"  # what operators and Prometheus ask needs no key
_CLIENT_GONE = 499  # nginx's number; nobody reads it

_STATUS: Mapping[Code, int] = {
    Code.INVALID_ARGUMENT: 400,
    Code.NOT_FOUND: 404,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.FAILED_PRECONDITION: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
    Code.CANCELLED: _CLIENT_GONE,
    Code.ABORTED: 503,
    Code.DATA_LOSS: 500,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
}
# OpenAI's names; whatever else is wrong with a request is an invalid_request_error, with us a server_error.
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# Our reasons under the codes that OpenAI's clients look for; the others go by their own names.
_CODES: Mapping[Reason, str] = {
    Reason.UNKNOWN_MODEL: "model_not_found",
    Reason.PROMPT_TOO_LONG: "context_length_exceeded",
    Reason.QUEUE_FULL: "rate_limit_exceeded",
    Reason.TENANT_QUOTA: "rate_limit_exceeded",
    Reason.BAD_KEY: "invalid_api_key",
}
_RETRY_STATUSES = (429, 503)


def http_status(error: TandemError) -> int:
    """The HTTP status of an error of ours."""
    return 413 if error.reason is Reason.MESSAGE_TOO_LARGE else _STATUS[error.code]


def error_object(status: int, message: str, param: str | None, code: str) -> dict[str, dict[str, str | None]]:
    """The body of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def tandem_error_object(error: TandemError) -> dict[str, dict[str, str | None]]:
    """An error of ours, its field by the name that HTTP clients gave it."""
    message, param = error.message, None
    if error.field is not None:
        param = body_param(error.field)
        if param is not None and message.startswith(f"{error.field}:"):
            message = f"{param}{message.removeprefix(error.field)}"
    message = message.encode("utf-8", "replace").decode()  # a report must never fail
    return error_object(http_status(error), message, param, _CODES.get(error.reason, error.reason.value))


def retry_headers(error: TandemError) -> dict[str, str]:
    """When to come back, where that helps: whole seconds, and milliseconds for OpenAI's own clients."""
    if http_status(error) not in _RETRY_STATUSES:
        return {}
    wait_s = error.retry_after_s
    if wait_s is None or not math.isfinite(wait_s):
        return {"Retry-After": "1"}
    return {"Retry-After": str(max(1, math.ceil(wait_s))), "Retry-After-Ms": str(max(1, math.ceil(1000 * wait_s)))}


def _key_headers(error: TandemError) -> dict[str, str]:
    """What a caller without a key is to send (RFC 6750, section 3)."""
    return {"WWW-Authenticate": "Bearer"} if error.code is Code.UNAUTHENTICATED else {}


class HttpServer:
    """A listening HTTP server; `port` is the one it got."""

    def __init__(self, runner: web.AppRunner, calls: HttpCalls, host: str, port: int) -> None:
        self._runner = runner
        self._calls = calls
        self.host = host
        self.port = port

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self.host}:{self.port}"

    async def stop(self, grace_s: float = _SHUTDOWN_GRACE_S) -> None:
        """Stops listening, lets running calls end within `grace_s`, then ends them with an error."""
        for site in self._runner.sites:
            await site.stop()
        await self._calls.stop(grace_s)
        await self._runner.cleanup()


async def start_http(
    host: str, port: int, routes: Sequence[web.RouteDef], calls: HttpCalls, metrics: RouterMetrics, access: Access | None = None
) -> HttpServer:
    """Listens on host:port (0: any free port). Routes below /v1/ ask for a key where `access` does.

    Raises ConfigError naming the port where it is taken.
    """
    if not 0 <= port <= _MAX_PORT:  # uvloop would wrap it round
        raise ConfigError(f"--http-port must be from 0 to {_MAX_PORT}, got {port}")
    app = web.Application(middlewares=[_guard(metrics, access or Access((), metrics))], client_max_size=MAX_BODY_BYTES)
    app.add_routes(routes)
    protocol_logger = logging.getLogger(f"{__name__}.protocol")
    protocol_logger.addFilter(_without_words)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, logger=protocol_logger, shutdown_timeout=_CLEANUP_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host.strip("[]"), port).start()
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        raise ConfigError(
            f"HTTP port {port} on {host} is in use or not allowed: choose another with --http-port", reason=Reason.PORT_IN_USE
        ) from error
    return HttpServer(runner, calls, host, runner.addresses[0][1])


def _without_words(record: logging.LogRecord) -> bool:
    """Of a malformed request only that there was one: aiohttp would quote the line, which may hold a key."""
    record.msg, record.args, record.exc_info, record.exc_text = "http_protocol_error", (), None, None
    return True


def _guard(metrics: RouterMetrics, access: Access) -> Middleware:
    """The one place where our errors, aiohttp's and bugs become an answer."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = request[HTTP_CALL] = HttpCall(read_request_id(request.headers))
        status = _CLIENT_GONE
        try:
            response = await _answer(request, handler, call, access)
            if not call.is_client_gone:
                status = response.status
            return response
        finally:
            resource = request.match_info.route.resource
            metrics.http_responses.labels("unknown" if resource is None else resource.canonical, str(status)).inc()

    return guard


async def _answer(request: web.Request, handler: Handler, call: HttpCall, access: Access) -> web.StreamResponse:
    try:
        resource = request.match_info.route.resource
        if resource is not None and resource.canonical.startswith(_WITH_KEY):
            call.tenant = access.tenant(request.headers)
        response = await handler(request)
        if not response.prepared:
            response.headers[_REQUEST_ID] = call.request_id
        return response
    except web.HTTPException as error:
        return _refuse_http(request, error, call)
    except TandemError as error:
        failure = error
    except asyncio.CancelledError:
        raise
    except Exception:
        logger.exception("http_handler_failed request_id=%s", call.request_id)
        failure = InternalError("the request failed; the server's log has the cause")
    refusal = await _refuse(failure, call)
    if request.content.exception() is not None:
        refusal.force_close()  # aiohttp reads nothing more on this connection
    return refusal


async def _refuse(error: TandemError, call: HttpCall) -> web.StreamResponse:
    body = msgspec.json.encode(tandem_error_object(error))
    if call.events is None or not call.events.has_started:
        return _json(body, http_status(error), {_REQUEST_ID: call.request_id, **retry_headers(error), **_key_headers(error)})
    if error.code is Code.CANCELLED:
        call.is_client_gone = True
        call.events.abort()
    else:
        await call.events.break_off(body)
    return call.events.response


def _refuse_http(request: web.Request, error: web.HTTPException, call: HttpCall) -> web.Response:
    """What aiohttp refused: an unknown route, a method, a body."""
    headers, message = {_REQUEST_ID: call.request_id}, error.text or error.reason
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        message = f"{request.method} is not served on {request.path}, but {headers['Allow']}"
    elif error.status == 404:
        message = f"there is no route {request.path}"
    elif error.status == 413:
        message = f"the body has more than {MAX_BODY_BYTES} bytes"
    code = Reason.UNKNOWN_ROUTE if error.status in (404, 405) else Reason.MESSAGE_TOO_LARGE if error.status == 413 else Reason.BAD_BYTES
    return _json(msgspec.json.encode(error_object(error.status, message, None, code.value)), error.status, headers)


def _json(body: bytes, status: int, headers: Mapping[str, str]) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)
