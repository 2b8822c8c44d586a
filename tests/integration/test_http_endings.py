"""How HTTP answers end early: deadlines, clients that leave or stop reading, the router's stop."""

import asyncio
import contextlib
import json
import time
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from router.event_stream import EventStream
from router.http_calls import HTTP_CALL
from tandem.errors import CancelledRequestError
from tests.integration.fake_worker import Faults
from tests.integration.http_router import PROMPT, HttpRouter, serve_http, serving
from tests.integration.router_shell import CONFIG, eventually

pytestmark = pytest.mark.integration


async def _read_until_tokens(response: aiohttp.ClientResponse) -> None:
    line = await response.content.readline()
    assert line.startswith(b"data: {")


@pytest.mark.parametrize("hang_at", [0, 4])
async def test_a_deadline_ends_the_request_and_frees_all(hang_at: int) -> None:
    async with serve_http(decode_0=Faults(hang_at=hang_at)) as http:
        answer = await http.complete({"x-request-timeout-ms": "300"}, stream=True)
        if hang_at == 0:
            assert (answer.status, answer.error["type"]) == (504, "timeout_error")
        else:
            assert answer.events[-1]["error"]["type"] == "timeout_error"
        await http.router.becomes_idle()
        assert http.router.metric("tandem_router_requests_total", model="m", outcome="deadline") == 1
        await eventually(lambda: http.workers["decode_0"].state.running_requests == 0)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
async def test_a_deadline_that_is_no_time_names_its_header(value: str) -> None:
    async with serve_http(decode_0=Faults()) as http:
        answer = await http.complete({"x-request-timeout-ms": value})
        assert (answer.status, answer.error["param"]) == (400, "x-request-timeout-ms")


async def test_a_deadline_in_ages_is_not_over_at_once() -> None:
    async with serve_http(decode_0=Faults()) as http:
        answer = await http.complete({"x-request-timeout-ms": "1e15"}, max_tokens=1)
        assert answer.status == 200


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, [4, 5]]])
async def test_a_client_that_leaves_frees_router_and_worker(is_stream: bool, prompts: list[list[int]]) -> None:
    """Each time, and within a second; a moment in which the machine stands still may spoil two of three tries."""
    async with serve_http(decode_0=Faults(hang_at=4)) as http:
        took_s = [await _seconds_to_free(http, prompts, is_stream=is_stream) for _ in range(3)]
        assert min(took_s) <= 1.0
        assert http.router.metric("tandem_router_requests_total", model="m", outcome="client_cancelled") == 3 * len(prompts)
        await eventually(lambda: http.router.metric("tandem_router_http_responses_total", route="/v1/completions", status="499") == 3)


async def test_a_stream_whose_write_finds_no_client_counts_as_left() -> None:
    """As where the handler is told: it is chance which of the two comes first."""

    async def leave(request: web.Request) -> web.StreamResponse:
        events = request[HTTP_CALL].events = EventStream(request, {}, stall_s=1.0)
        await events.send(b"a token")
        raise CancelledRequestError

    registry = CollectorRegistry()
    async with (
        serving(web.get("/stream", leave), registry=registry) as address,
        aiohttp.ClientSession() as session,
        session.get(f"http://{address}/stream") as response,
    ):
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert registry.get_sample_value("tandem_router_http_responses_total", {"route": "/stream", "status": "499"}) == 1


async def _seconds_to_free(http: HttpRouter, prompts: list[list[int]], *, is_stream: bool) -> float:
    """From the leaving of a client whose requests run until nothing is held for it."""
    worker = http.workers["decode_0"]
    worker.hangs.clear()
    call = asyncio.create_task(http.complete(prompt=prompts, stream=is_stream))
    await eventually(lambda: worker.state.running_requests == len(prompts))
    await worker.hangs.wait()
    left_s = time.monotonic()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await http.router.becomes_idle()
    await eventually(lambda: worker.state.running_requests == 0)
    return time.monotonic() - left_s


async def test_a_client_that_leaves_in_the_queue_frees_its_place() -> None:
    async with serve_http(replace(CONFIG, max_running_requests=1), decode_0=Faults(hang_at=4)) as http:
        first = asyncio.create_task(http.complete())
        await http.workers["decode_0"].hangs.wait()
        second = asyncio.create_task(http.complete())
        await eventually(lambda: http.router.shell.core.queued_requests == 1)
        second.cancel()
        await eventually(lambda: http.router.shell.core.queued_requests == 0)
        assert len(http.workers["decode_0"].requests) == 1
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)


async def test_a_client_that_stops_reading_is_cut_off() -> None:
    ended = asyncio.Event()

    async def pour(request: web.Request) -> web.StreamResponse:
        events = request[HTTP_CALL].events = EventStream(request, {}, 0.2)
        try:
            while True:
                await events.send(b"x" * 2**16)
        finally:
            ended.set()

    async with serving(web.get("/pour", pour)) as address:
        reader, writer = await asyncio.open_connection(*address.split(":"), limit=1024)
        writer.write(b"GET /pour HTTP/1.1\r\nHost: h\r\n\r\n")
        await asyncio.wait_for(ended.wait(), 10)
        with contextlib.suppress(ConnectionResetError):
            assert not (await asyncio.wait_for(reader.read(), 10)).endswith(b"0\r\n\r\n")  # broken off, not ended
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()


async def test_a_running_stream_may_end_within_the_grace() -> None:
    async with serve_http(decode_0=Faults()) as http:
        http.workers["decode_0"].token_delay_s = 0.02
        url = f"http://{http.server.address}/v1/completions"
        async with http.session.post(url, json={"prompt": PROMPT, "stream": True, "max_tokens": 20}) as response:
            await _read_until_tokens(response)
            stopping = asyncio.create_task(http.server.stop(5.0))
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        await stopping


async def test_after_the_grace_a_stream_ends_with_an_error_and_new_calls_are_refused() -> None:
    async with serve_http(decode_0=Faults(hang_at=2)) as http:
        url = f"http://{http.server.address}/v1/completions"
        reader, writer = await asyncio.open_connection("127.0.0.1", http.server.port)  # connected before the stop
        async with http.session.post(url, json={"prompt": PROMPT, "stream": True}) as response:
            await _read_until_tokens(response)
            await http.workers["decode_0"].hangs.wait()
            stopping = asyncio.create_task(http.server.stop(0.5))
            await asyncio.sleep(0.1)
            body = b'{"prompt": [1]}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            writer.write(head + body)
            assert b" 503 " in await reader.readline()
            rest = await response.read()
        await stopping
        writer.close()
        await writer.wait_closed()
        assert json.loads(rest.decode().split("data: ")[-1])["error"]["code"] == "draining"
        await http.router.becomes_idle()
