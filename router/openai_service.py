"""The OpenAI API: /v1/completions, /v1/chat/completions and /v1/models, on the path that gRPC takes too.

Must not map errors to HTTP (`http.py` does). The status is the real one until the first token: a stream's headers go out with its first
chunk. When the client goes, the handler is cancelled, and with it everything the request holds.
"""

import asyncio
import time
from collections.abc import Callable

import msgspec
from aiohttp import web

from router.event_stream import EventStream
from router.frontend import Frontend
from router.http_body import HttpBodies
from router.http_calls import HTTP_CALL, HttpCalls
from router.openai_answer import Answer, Changed, PromptCall
from router.openai_request import Hints, OpenAiRequest, read_chat, read_completion, read_hints
from router.openai_response import CHAT, COMPLETION, Choice, Format, JsonObject, model_object
from router.shell import RouterShell
from router.tokenizer import Tokenizers
from tandem.deadline import Deadline
from tandem.domain import ModelId
from tandem.errors import NotFoundError, Reason
from tandem.v1 import inference_pb2

_LATE_S = 0.5  # core and workers end a request at its deadline and say in which stage; this long after, its call ends whatever they do


class OpenAiService:
    """What OpenAI's clients call."""

    def __init__(self, shell: RouterShell, frontend: Frontend, tokenizers: Tokenizers, calls: HttpCalls) -> None:
        self._shell = shell
        self._frontend = frontend
        self._tokenizers = tokenizers
        self._calls = calls
        self._bodies = HttpBodies()
        self._created = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        """For the application."""
        return [
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat_completions),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{model:.+}", self.model),
        ]

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Raises TandemError, and aiohttp's errors where the body cannot be read."""
        return await self._serve(request, COMPLETION, read_completion)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """The same for conversations."""
        return await self._serve(request, CHAT, read_chat)

    async def models(self, request: web.Request) -> web.Response:
        """Models that are or were served, or are to be."""
        return _json({"object": "list", "data": [self._model(model) for model in self._shell.core.fleet.models]})

    async def model(self, request: web.Request) -> web.Response:
        """One of them. Raises NotFoundError."""
        name = ModelId(request.match_info["model"])
        if name not in self._shell.core.fleet.models:
            raise NotFoundError(f"model {name!r} is not served", reason=Reason.UNKNOWN_MODEL, field="model")
        return _json(self._model(name))

    def _model(self, model: ModelId) -> JsonObject:
        lease = self._shell.core.fleet.last_lease(model)
        engine = None if lease is None else lease.engine
        return model_object(
            model,
            context_tokens=None if engine is None else engine.context_tokens,
            created=self._created,
            engine=None if engine is None else engine.engine,
        )

    async def _serve(self, request: web.Request, form: Format, read: Callable[[bytes, Hints], OpenAiRequest]) -> web.StreamResponse:
        hints = read_hints(request.headers, request[HTTP_CALL].request_id)
        deadline = Deadline(hints.timeout_s)
        async with self._calls.limit(None if hints.timeout_s is None else hints.timeout_s + _LATE_S):
            wanted = await self._bodies.parse(request, lambda body: read(body, hints))
            if wanted.is_stream:
                return await self._stream(request, form, wanted, hints, deadline)
            answer = self._answer(request, form, wanted, hints, deadline)
            await self._run(wanted, answer)
            whole = answer.whole()
            if hints.wants_receipt:
                whole["tandem"] = answer.receipts()
            return _json(whole)

    async def _stream(
        self, request: web.Request, form: Format, wanted: OpenAiRequest, hints: Hints, deadline: Deadline
    ) -> web.StreamResponse:
        stall_s = self._shell.config.client_stall_s
        events = request[HTTP_CALL].events = EventStream(request, {"x-request-id": hints.request_id}, stall_s)

        async def send(call: PromptCall, choice: Choice) -> None:
            await events.send(msgspec.json.encode(answer.chunk(call, choice)))

        answer = self._answer(request, form, wanted, hints, deadline, send)
        await self._run(wanted, answer)
        if wanted.wants_usage:
            last = answer.last_chunk()
            if hints.wants_receipt:
                last["tandem"] = answer.receipts()
            await events.send(msgspec.json.encode(last))
        elif hints.wants_receipt:
            await events.comment(b"tandem " + msgspec.json.encode(answer.receipts()))
        await events.send(b"[DONE]")
        return events.response

    def _answer(
        self,
        request: web.Request,
        form: Format,
        wanted: OpenAiRequest,
        hints: Hints,
        deadline: Deadline,
        changed: Changed | None = None,
    ) -> Answer:
        tenant = request[HTTP_CALL].tenant
        calls = [PromptCall(wanted, number, deadline, self._tokenizers, tenant, changed) for number in range(len(wanted.messages))]
        return Answer(form, wanted, calls, request_id=hints.request_id, created=int(time.time()))

    async def _run(self, wanted: OpenAiRequest, answer: Answer) -> None:
        """Runs all prompts at once; the first error ends all."""
        pairs = list(zip(wanted.messages, answer.calls, strict=True))
        if len(pairs) == 1:
            await self._generate(*pairs[0])
            return
        try:
            async with asyncio.TaskGroup() as group:
                for number, (message, call) in enumerate(pairs):
                    group.create_task(self._generate(message, call), name=f"prompt {number}")
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _generate(self, message: inference_pb2.GenerateRequest, call: PromptCall) -> None:
        call.receipt = await self._frontend.generate(message, call)


def _json(value: JsonObject) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
