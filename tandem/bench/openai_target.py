"""An OpenAI-compatible server under load: /v1/completions with token ids as prompt, streamed. Must not decide what is sent when.

A message with `choices` is a token message, and the token count is the server's `usage`: as `vllm bench serve` counts.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp

from tandem.bench.event_stream import EventStream
from tandem.bench.target import Call, ServedModel
from tandem.errors import AuthenticationError, ConfigError, ProtocolError, Reason, TandemError, UnavailableError
from tandem.report import RequestRecord
from tandem.workload import PlannedRequest

_QUERY_TIMEOUT_S = 10.0
_MAX_ERROR_BYTES = 2_000
_KEEP_ALIVE_S = 4.0  # below the 5 s after which uvicorn closes: a request must not meet a connection that is being closed


class OpenAITarget:
    """Connections are as many as requests in flight, and are kept for the next ones. Make it on its event loop."""

    kind = "openai"

    def __init__(self, url: str, *, timeout_s: float, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.address = base_url(url)
        self._timeout_s = timeout_s
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None)  # asyncio.timeout holds the deadline of a whole request
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=[("Content-Type", "application/json"), *headers]
        )

    async def models(self) -> Sequence[ServedModel]:
        """The server's list, empty where it has none; raises UnavailableError where nobody answers, AuthenticationError for the key."""
        url = f"{self.address}/v1/models"
        try:
            async with asyncio.timeout(_QUERY_TIMEOUT_S), self._session.get(url) as response:
                status, body = response.status, await response.read()
        except TimeoutError as error:
            raise UnavailableError(f"no answer from {url} within {_QUERY_TIMEOUT_S:.0f} s", reason=Reason.NO_REPLICA) from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"cannot reach {self.address}: {error}", reason=Reason.NO_REPLICA) from error
        if status == 401:
            raise AuthenticationError(f"{url} asks for another API key: give TANDEM_API_KEY or --api-key")
        if status in (404, 405, 501):
            return ()
        if status != 200:
            raise UnavailableError(f"{url} answered with HTTP status {status}", reason=Reason.NO_REPLICA)
        return _models(url, body)

    def prepare(self, request: PlannedRequest, token_ids: Sequence[int], model: str) -> Call:
        """The body is encoded here."""
        fields = {
            "model": model,
            "prompt": token_ids,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(fields, separators=(",", ":")).encode()

        async def call(record: RequestRecord) -> None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._stream(body, record)
            except TimeoutError:
                record.fail("deadline", f"no complete answer within {self._timeout_s} s")
            except aiohttp.ClientConnectionError as error:
                record.fail("connection", str(error) or type(error).__name__)
            except (aiohttp.ClientError, OSError) as error:
                record.fail("broken_stream", str(error) or type(error).__name__)
            except TandemError as error:
                record.fail(error.reason.value, error.message)

        return call

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def _stream(self, body: bytes, record: RequestRecord) -> None:
        async with self._session.post(f"{self.address}/v1/completions", data=body) as response:
            if response.status != 200:
                text = (await response.content.read(_MAX_ERROR_BYTES)).decode(errors="replace")
                record.fail(f"http_{response.status}", " ".join(text.split()) or str(response.reason))
                return
            answer, events = _Answer(record), EventStream()
            async for payload in response.content.iter_any():
                now_s = time.perf_counter()  # messages that came together have one time
                for data in events.feed(payload):
                    answer.take(data, now_s)
        answer.end()


class _Answer:
    """Reads the events of one answer into its record."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._usage_tokens: int | None = None
        self._has_ended = False

    def take(self, data: bytes, now_s: float) -> None:
        """One event; raises ProtocolError where it is no answer of this API."""
        if data == b"[DONE]":
            self._has_ended = True
            return
        event = _parse_object("an event", data)
        if "error" in event:
            self._record.fail("stream_error", json.dumps(event["error"]))
        choices, usage = event.get("choices"), event.get("usage")
        if isinstance(choices, list) and choices:
            self._record.take_tokens(now_s, 1)
            self._has_ended |= isinstance(choices[0], dict) and choices[0].get("finish_reason") is not None
        if isinstance(usage, dict):
            prompt_tokens, output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
            self._usage_tokens = output_tokens if isinstance(output_tokens, int) else self._usage_tokens
            self._record.prompt_tokens = prompt_tokens if isinstance(prompt_tokens, int) else self._record.prompt_tokens

    def end(self) -> None:
        """The server closed the stream; raises ProtocolError where it had not finished."""
        if not self._has_ended and not self._record.reason:
            raise ProtocolError("the stream ended without a finish reason")
        if self._usage_tokens is None:
            self._record.is_counted_by_message = True
        else:
            self._record.output_tokens = self._usage_tokens


def base_url(url: str) -> str:
    """The server's root: `http://host:port`, with or without /v1, as it was given; raises ConfigError naming --url."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:
        is_good = False
    if not is_good:
        raise ConfigError(f"--url must be http://HOST:PORT or https://HOST:PORT, got {url[:200]!r}")
    return url.rstrip("/").removesuffix("/v1/completions").removesuffix("/v1")


def _models(url: str, body: bytes) -> Sequence[ServedModel]:
    data = _parse_object(url, body).get("data")
    if not isinstance(data, list):
        raise ProtocolError(f"{url} does not list models")
    found = []
    for entry in data:
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            context_tokens, engine = entry.get("max_model_len"), entry.get("engine")
            found.append(
                ServedModel(
                    id=entry["id"],
                    context_tokens=context_tokens if isinstance(context_tokens, int) else None,
                    engine=engine if isinstance(engine, str) else None,
                )
            )
    return found


def _parse_object(what: str, data: bytes) -> dict[str, object]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ProtocolError(f"{what} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is no JSON object")
    return value
