"""An OpenAI server of a few lines on loopback, whose behaviour the request's model name chooses."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


class FakeOpenAI:
    """Streams `max_tokens` tokens, one a message; `models` is what /v1/models lists, None where it has no such page."""

    def __init__(self) -> None:
        self.url = ""
        self.models: list[dict[str, object]] | None = [{"id": "tiny", "max_model_len": 512}]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.delay_s = 0.0
        self.has_request = asyncio.Event()
        self.is_idle = asyncio.Event()

    async def list_models(self, request: web.Request) -> web.Response:
        if self.models is None:
            raise web.HTTPNotFound
        return web.json_response({"object": "list", "data": self.models})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.has_request.set()
        self.is_idle.clear()
        try:
            return await self._answer(request, body)
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self.is_idle.set()

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(self.delay_s)
        if body["model"] == "full":
            return web.json_response({"error": {"message": "the queue\nis full"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        match body["model"]:
            case "endless":
                while True:
                    await _send(response, {"choices": [{"text": "x", "finish_reason": None}]})
                    await asyncio.sleep(0.005)
            case "silent":
                await asyncio.sleep(60.0)
            case "empty":
                await _send(response, "[DONE]")
            case "damaged":
                await _send(response, "{")
            case "unfinished":
                await _send(response, {"choices": [{"text": "x", "finish_reason": None}]})
            case "broken":
                await _send(response, {"choices": [{"text": "x", "finish_reason": None}]})
                assert request.transport is not None
                request.transport.close()
            case "error":
                await _send(response, {"choices": [{"text": "x", "finish_reason": None}]})
                await _send(response, {"error": {"message": "lost"}})
                await _send(response, "[DONE]")
            case model:
                await response.write(b": ping\n\n")
                await _count(response, body, has_usage=model != "no-usage", at_a_time=2 if model == "pairs" else 1)
        return response


async def _count(response: web.StreamResponse, body: dict[str, Any], *, has_usage: bool, at_a_time: int) -> None:
    tokens = body["max_tokens"]
    for first in range(0, tokens, at_a_time):
        is_last = first + at_a_time >= tokens
        await _send(response, {"choices": [{"text": "t " * at_a_time, "finish_reason": "length" if is_last else None}], "usage": None})
    if has_usage:
        await _send(response, {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}})
    await _send(response, "[DONE]")


async def _send(response: web.StreamResponse, event: object) -> None:
    data = event if isinstance(event, str) else json.dumps(event)
    await response.write(f"data: {data}\n\n".encode())


@asynccontextmanager
async def serve_openai(fake: FakeOpenAI) -> AsyncIterator[None]:
    """The fake on a free port of loopback; its `url` is set."""
    app = web.Application()
    app.router.add_get("/v1/models", fake.list_models)
    app.router.add_post("/v1/completions", fake.completions)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield
    finally:
        await runner.cleanup()
