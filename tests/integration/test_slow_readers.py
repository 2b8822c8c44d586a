"""Clients that stop reading: what they hold is bounded in bytes and in time, and nobody else waits for them."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import grpc.aio
import pytest

from tandem import rpc
from tandem.errors import CancelledRequestError, Reason
from tandem.session import has_lost_router
from tandem.v1 import inference_pb2
from tests.integration.fake_worker import FakeWorker, Faults, serve_workers
from tests.integration.http_router import PROMPT, serve_http_over
from tests.integration.router_shell import CONFIG, GENERATE, eventually, expected, message, sample_request, serve_router
from tests.samples import ENGINE

pytestmark = pytest.mark.integration

STALLING = replace(CONFIG, client_stall_s=2.0)
ENGINE_WITHOUT_END = replace(ENGINE, context_tokens=10**9, kv_blocks=10**9)
ENDLESS_TOKENS = 10**8
READERS, STALLED = 20, 6
MOST_UNREAD_BYTES = 2**20  # of one request by gRPC, in all buffers on its way
MOST_UNREAD_HTTP_BYTES = 16 * 2**20  # with the kernel's of its connection
# What a client's own gRPC takes in unread is its own memory, and grows to some MiB before the other end sees a stall.
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))


@asynccontextmanager
async def pouring_workers(text: str) -> AsyncIterator[dict[str, FakeWorker]]:
    """Two that send a message with this text as often as it is taken, for as long as anybody likes."""
    async with serve_workers(prefill_0=Faults(text=text), decode_0=Faults(text=text)) as workers:
        for worker in workers.values():
            worker.state.lease = replace(worker.state.lease, engine=ENGINE_WITHOUT_END)
        yield workers


def unread_bytes(workers: dict[str, FakeWorker]) -> list[int]:
    """What was sent of each endless request."""
    sent = (item for worker in workers.values() for item in worker.written_bytes.items())
    return [size for name, size in sent if name.startswith("endless")]


async def test_grpc_clients_that_stop_reading_hold_little_and_hold_up_nobody() -> None:
    async with pouring_workers("x" * 300) as workers, serve_router(workers, STALLING) as router:
        client = grpc.aio.insecure_channel(router.address, options=SMALL_WINDOW)
        endless = [message(3, ENDLESS_TOKENS, request_id=f"endless-{number}") for number in range(STALLED)]
        streams = [rpc.start_stream(client, GENERATE, one, timeout_s=None) for one in endless]
        for stream in streams:
            assert await stream.read()

        async def on_the_same_connection() -> list[int]:
            async with rpc.open_stream(client, GENERATE, message(4, 50), timeout_s=20) as stream:
                messages = [inference_pb2.GenerateResponse.FromString(payload) async for payload in stream]
            return [token for one in messages for token in one.token_ids]

        readers = [router.generate(message(100 + number, 100)) for number in range(READERS)]
        beside, outputs = await asyncio.gather(on_the_same_connection(), asyncio.gather(*readers))
        assert beside == expected(sample_request(4, 50))
        assert [output.tokens[0] for output in outputs] == [expected(sample_request(100 + number, 100)) for number in range(READERS)]

        await router.becomes_idle()  # for nobody waits longer than `client_stall_s`
        await eventually(lambda: not any(worker.state.running_requests for worker in workers.values()))
        assert router.metric("tandem_router_requests_total", model="m", outcome="client_stalled") == STALLED
        sent = unread_bytes(workers)
        assert len(sent) == STALLED
        assert 2**16 < min(sent) <= max(sent) < MOST_UNREAD_BYTES

        for stream in streams:  # who reads on gets what was on its way, and is told why there is no more
            with pytest.raises(CancelledRequestError, match="the client has read nothing for 2 s") as caught:
                _ = [payload async for payload in stream]
            assert caught.value.reason is Reason.CLIENT_STALLED
            assert has_lost_router(caught.value)  # so the SDK goes on from there
        await client.close(None)


async def test_http_clients_that_stop_reading_hold_little_and_hold_up_nobody() -> None:
    async with pouring_workers("x" * 4000) as workers, serve_http_over(workers, STALLING) as http:
        slow = [await stop_reading(http.server.port, number) for number in range(STALLED)]
        answers = await asyncio.gather(*(http.complete(max_tokens=100) for _ in range(READERS)))
        assert {(answer.status, answer.json["usage"]["completion_tokens"]) for answer in answers} == {(200, 100)}
        await http.router.becomes_idle()
        assert http.router.metric("tandem_router_requests_total", model="m", outcome="client_stalled") == STALLED
        assert max(unread_bytes(workers)) < MOST_UNREAD_HTTP_BYTES
        for connection in slow:
            assert not (await read_on(connection)).endswith(b"0\r\n\r\n")  # broken off, not ended
            connection.close()


async def stop_reading(port: int, number: int) -> socket.socket:
    """A connection whose answer has begun."""
    connection, loop = socket.socket(), asyncio.get_running_loop()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 2**10)
    connection.setblocking(False)
    await loop.sock_connect(connection, ("127.0.0.1", port))
    body = json.dumps({"prompt": PROMPT, "max_tokens": ENDLESS_TOKENS, "stream": True}).encode()
    fields = ("Host: h", "Content-Type: application/json", f"Content-Length: {len(body)}", f"x-request-id: endless-{number}")
    head = "\r\n".join(("POST /v1/completions HTTP/1.1", *fields, "", ""))
    await loop.sock_sendall(connection, head.encode() + body)
    assert (await loop.sock_recv(connection, 1000)).startswith(b"HTTP/1.1 200 OK")
    return connection


async def read_on(connection: socket.socket) -> bytes:
    """The end of what still comes."""
    tail, loop = b"", asyncio.get_running_loop()
    with suppress(ConnectionResetError):
        while data := await loop.sock_recv(connection, 2**16):
            tail = (tail + data)[-100:]
    return tail
