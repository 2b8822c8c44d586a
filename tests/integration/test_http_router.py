"""The router's HTTP endpoint in front of fake workers: answers, streams, errors, what operators ask."""

import asyncio
import gzip
import io
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from router.http_body import HttpBodies
from tandem.errors import EngineError, Reason, UnavailableError
from tests.integration.fake_worker import Faults, expected_token
from tests.integration.http_router import PROMPT, serve_http, serving
from tests.integration.router_shell import CONFIG, eventually
from tests.samples import make_request

pytestmark = pytest.mark.integration

WITH_IDS: Any = {"return_token_ids": True, "max_tokens": 8}


def _expected(prompt: list[int], choice: int = 0, tokens: int = 8) -> list[int]:
    request = replace(make_request(), prompt_token_ids=tuple(prompt))
    return [expected_token(request, position, choice) for position in range(tokens)]


def _token_ids(events: list[Any], index: int = 0) -> list[int]:
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return [token for choice in choices if choice["index"] == index for token in choice["token_ids"]]


# Answers


async def test_a_completion_has_every_token_and_its_usage() -> None:
    async with serve_http(decode_0=Faults(coalesced_tokens=3)) as http:
        answer = await http.complete(**WITH_IDS)
        choice = answer.json["choices"][0]
        assert (answer.status, answer.json["object"], answer.json["model"]) == (200, "text_completion", "m")
        assert (choice["token_ids"], choice["prompt_token_ids"]) == (_expected(PROMPT), PROMPT)
        assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("length", None, None)
        assert answer.json["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 8,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        await http.router.becomes_idle()
        assert http.router.metric("tandem_router_requests_total", model="m", outcome="ok") == 1
        assert http.router.metric("tandem_router_output_tokens_total", model="m") == 8
        assert http.router.metric("tandem_router_http_responses_total", route="/v1/completions", status="200") == 1


async def test_a_stream_has_the_same_tokens_then_usage_then_done() -> None:
    async with serve_http(decode_0=Faults(coalesced_tokens=3)) as http:
        answer = await http.complete(stream=True, stream_options={"include_usage": True}, **WITH_IDS)
        *chunks, usage, done = answer.events
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert (done, _token_ids(chunks), len(chunks)) == ("[DONE]", _expected(PROMPT), 3)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 8)
        assert len({chunk["id"] for chunk in (*chunks, usage)}) == 1


async def test_running_usage_is_in_every_chunk() -> None:
    async with serve_http(decode_0=Faults()) as http:
        options = {"include_usage": True, "continuous_usage_stats": True}
        answer = await http.complete(stream=True, stream_options=options, max_tokens=3)
        assert [event["usage"]["completion_tokens"] for event in answer.events[:-1]] == [1, 2, 3, 3]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_several_prompts_run_at_once_and_their_choices_are_numbered_through(is_stream: bool) -> None:
    async with serve_http(decode_0=Faults()) as http:
        prompts = [[1, 2, 3], [4, 5], [6]]
        answer = await http.complete(prompt=prompts, n=2, seed=0, stream=is_stream, **WITH_IDS)
        events = answer.events if is_stream else [answer.json]
        for number, prompt in enumerate(prompts):
            for choice in range(2):
                assert _token_ids(events, 2 * number + choice) == _expected(prompt, choice)
        if not is_stream:
            assert answer.json["usage"]["prompt_tokens"] == 6
            assert answer.json["usage"]["completion_tokens"] == 48


async def test_a_request_id_is_used_and_answered() -> None:
    async with serve_http(decode_0=Faults()) as http:
        answer = await http.complete({"x-request-id": "mine"}, max_tokens=1)
        assert (answer.headers["x-request-id"], answer.json["id"]) == ("mine", "cmpl-mine")
        assert http.workers["decode_0"].requests[0].request_id.startswith("mine-")
        answer = await http.complete({"x-request-id": "x" * 200}, max_tokens=1)
        assert answer.headers["x-request-id"] != "x" * 200
        assert answer.json["id"] == f"cmpl-{answer.headers['x-request-id']}"


async def test_a_receipt_comes_only_where_it_is_asked_for() -> None:
    async with serve_http(decode_0=Faults()) as http:
        asked = {"x-tandem-receipt": "1"}
        assert "tandem" not in (await http.complete(max_tokens=2)).json
        receipt = (await http.complete(asked, max_tokens=2)).json["tandem"]
        assert (receipt["decode_replica_id"], receipt["handed_off"], receipt["output_tokens"]) == ("decode_0", False, 2)
        assert receipt["ttft_s"] > 0
        last = (await http.complete(asked, max_tokens=2, stream=True, stream_options={"include_usage": True})).events[-2]
        assert last["tandem"]["decode_replica_id"] == "decode_0"
        body = (await http.complete(asked, max_tokens=2, stream=True)).body
        comment = next(line for line in body.decode().split("\n\n") if line.startswith(": tandem "))
        assert json.loads(comment.removeprefix(": tandem "))["output_tokens"] == 2


# Errors


@pytest.mark.parametrize(
    ("data", "param", "text"),
    [
        (b"{", None, "is not JSON"),
        (b"[1]", None, "expected `object`"),
        (b"{}", "prompt", "is required"),
        (b'{"prompt": ""}', "prompt", "must not be empty"),
        (b'{"prompt": [1], "max_tokens": "5"}', "max_tokens", "got `str`"),
        (b'{"prompt": [1], "max_tokens": 0}', "max_tokens", "must be at least 1"),
        (b'{"prompt": [1], "temperature": -1}', "temperature", "from 0 to 100"),
        (b'{"prompt": [1], "n": 99}', "n", "from 1 to 16"),
        (b'{"prompt": [99999]}', "prompt", "not in the vocabulary"),
        (b'{"prompt": [1, "a"]}', "prompt", "must be one string"),
        (b'{"prompt": [1], "echo": true}', "echo", "not supported"),
    ],
)
async def test_bad_input_is_a_400_that_names_the_key(data: bytes, param: str | None, text: str) -> None:
    async with serve_http(decode_0=Faults()) as http:
        answer = await http.ask("POST", "/v1/completions", data=data, headers={"content-type": "application/json"})
        assert (answer.status, answer.error["type"], answer.error["param"]) == (400, "invalid_request_error", param)
        assert text in answer.error["message"]
        assert not http.workers["decode_0"].requests


async def test_a_prompt_over_the_context_is_a_400_that_says_so() -> None:
    async with serve_http(decode_0=Faults()) as http:
        answer = await http.complete(prompt=[1] * 2000)
        assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "prompt", "context_length_exceeded")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_unknown_model_is_a_404(is_stream: bool) -> None:
    async with serve_http(decode_0=Faults()) as http:
        answer = await http.complete(model="nowhere", stream=is_stream)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
        answer = await http.ask("GET", "/v1/models/nowhere")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")


async def test_an_unknown_route_or_method_is_an_error_object_too() -> None:
    async with serve_http(decode_0=Faults()) as http:
        answer = await http.ask("GET", "/v2/completions")
        assert (answer.status, answer.error["code"]) == (404, "unknown_route")
        answer = await http.ask("GET", "/v1/completions")
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")
        assert answer.error["type"] == "invalid_request_error"


async def test_a_body_that_is_no_json_by_type_or_too_large_is_refused() -> None:
    async with serve_http(decode_0=Faults()) as http:
        answer = await http.ask("POST", "/v1/completions", data=b'{"prompt": [1]}', headers={"content-type": "text/plain"})
        assert (answer.status, "application/json" in answer.error["message"]) == (415, True)
        answer = await http.ask(
            "POST", "/v1/completions", data=io.BytesIO(b" " * (2**24 + 1)), headers={"content-type": "application/json"}
        )
        assert (answer.status, answer.error["code"]) == (413, "message_too_large")


async def test_too_many_calls_are_a_429_that_says_when_to_come_back() -> None:
    config = replace(CONFIG, max_queued_requests=1, max_running_requests=1)
    async with serve_http(config, decode_0=Faults(hang_at=0)) as http:
        held = [asyncio.create_task(http.complete()) for _ in range(2)]
        await eventually(lambda: http.router.shell.core.queued_requests == 1)
        answer = await http.complete()
        assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["Retry-After"]) >= 1
        for call in held:
            call.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await http.router.becomes_idle()


async def test_without_a_worker_it_is_a_503_and_unhealthy() -> None:
    async with serve_http(is_waiting=False) as http:
        answer = await http.complete()
        assert (answer.status, answer.error["type"], answer.headers["Retry-After"]) == (503, "service_unavailable_error", "1")
        health = await http.ask("GET", "/health")
        assert (health.status, health.json["reason"]) == (503, "no replica is reachable")


async def test_a_failure_before_the_first_token_has_its_own_status_in_a_stream() -> None:
    lost = UnavailableError("gone", reason=Reason.WORKER_LOST)
    async with serve_http(replace(CONFIG, retry_budget=0), decode_0=Faults(error_at=0, error=lost)) as http:
        answer = await http.complete(stream=True)
        assert (answer.status, answer.error["code"]) == (503, "worker_lost")


async def test_a_failure_after_the_first_token_is_the_last_event_without_done() -> None:
    async with serve_http(replace(CONFIG, retry_budget=0), decode_0=Faults(error_at=2, error=EngineError("died"))) as http:
        answer = await http.complete(stream=True, **WITH_IDS)
        *chunks, last = answer.events
        assert (answer.status, _token_ids(chunks)) == (200, _expected(PROMPT)[:2])
        assert last["error"]["code"] == "engine_failed"
        await http.router.becomes_idle()


async def test_one_id_may_serve_several_requests_at_once() -> None:
    async with serve_http(decode_0=Faults()) as http:
        answers = await asyncio.gather(*(http.complete({"x-request-id": "a"}, max_tokens=4) for _ in range(3)))
        assert [(answer.status, answer.headers["x-request-id"], answer.json["id"]) for answer in answers] == [(200, "a", "cmpl-a")] * 3
        assert len({request.request_id for request in http.workers["decode_0"].requests}) == 3


async def test_a_body_that_its_encoding_does_not_fit_is_the_clients_error() -> None:
    async with serve_http(decode_0=Faults()) as http:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = await http.ask("POST", "/v1/completions", data=b'{"prompt": [1]}', headers=headers)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "bad_bytes", None)
        answer = await http.ask("POST", "/v1/completions", data=gzip.compress(b'{"prompt": [1], "max_tokens": 1}'), headers=headers)
        assert answer.status == 200


async def test_bodies_that_are_being_read_have_a_bound_and_give_their_room_back() -> None:
    bodies, arrived, go_on = HttpBodies(max_bytes=100), asyncio.Event(), asyncio.Event()

    async def serve(request: web.Request) -> web.Response:
        return web.Response(body=await bodies.parse(request, lambda body: b"%d" % len(body)))

    async def slow_body() -> AsyncIterator[bytes]:
        yield b"x" * 80
        arrived.set()
        await go_on.wait()
        yield b"x" * 10

    headers = {"content-type": "application/json"}
    async with serving(web.post("/", serve)) as address, aiohttp.ClientSession(headers=headers) as session:
        slow = asyncio.create_task(session.post(f"http://{address}/", data=slow_body()))
        await arrived.wait()
        await eventually(lambda: bodies._bytes == 80)
        async with session.post(f"http://{address}/", data=b"x" * 21) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (429, "rate_limit_exceeded")
            assert "Retry-After" in answer.headers
        go_on.set()
        async with await slow as answer:
            assert await answer.read() == b"90"
        async with session.post(f"http://{address}/", data=b"x" * 100) as answer:
            assert await answer.read() == b"100"
        assert bodies._bytes == 0


async def test_a_malformed_request_is_logged_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async with serve_http(decode_0=Faults()) as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.server.port)
        with caplog.at_level(logging.DEBUG):
            writer.write(b"GET /health HTTP/1.1\r\nAuthorization secret-key\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.0 400")
        writer.close()
        await writer.wait_closed()
        assert "secret-key" not in caplog.text


# What operators ask


async def test_models_health_version_metrics_and_discovery_answer() -> None:
    async with serve_http(decode_0=Faults()) as http:
        worker = http.workers["decode_0"]
        worker.state.set_addresses(worker.state.lease.address, "127.0.0.1:9")
        await eventually(lambda: http.router.shell.core.fleet.leases[0].metrics_address)
        models = (await http.ask("GET", "/v1/models")).json
        assert (models["object"], [(model["id"], model["max_model_len"]) for model in models["data"]]) == ("list", [("m", 1024)])
        assert (await http.ask("GET", "/v1/models/m")).json == models["data"][0]
        assert (await http.ask("GET", "/health")).json == {"status": "ok"}
        head = await http.ask("HEAD", "/health")
        assert (head.status, head.body) == (200, b"")
        assert set((await http.ask("GET", "/version")).json) == {"version"}
        metrics = await http.ask("GET", "/metrics")
        assert metrics.headers["Content-Type"].startswith("text/plain; version=")
        assert b"tandem_router_http_responses_total{" in metrics.body
        asked = {"accept": "application/openmetrics-text; version=1.0.0"}
        assert (await http.ask("GET", "/metrics", headers=asked)).body.endswith(b"# EOF\n")
        target = (await http.ask("GET", "/sd")).json[0]
        assert (target["targets"], target["labels"]["replica_id"], target["labels"]["role"]) == (["127.0.0.1:9"], "decode_0", "decode")


async def test_a_bug_is_a_500_that_hides_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: web.Request) -> web.Response:
        raise ValueError("inner words")

    async with serving(web.get("/bug", fail)) as address:
        async with aiohttp.ClientSession() as session, session.get(f"http://{address}/bug") as response:
            error = (await response.json())["error"]
        assert (response.status, error["type"], error["code"]) == (500, "server_error", "bug")
        assert "inner words" not in error["message"]
        assert "http_handler_failed" in caplog.text
