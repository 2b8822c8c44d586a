"""The proxy of a chaos run, between real sockets: passes, delays, swallows and resets."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from tandem.chaos.proxy import Proxy

pytestmark = pytest.mark.integration


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while payload := await reader.read(1024):
            writer.write(payload)
            await writer.drain()
    writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    made = Proxy(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await made.start()
    yield made
    await made.close()
    server.close()
    await server.wait_closed()


async def connect(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = proxy.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def echoed(ends: tuple[asyncio.StreamReader, asyncio.StreamWriter], payload: bytes) -> bytes:
    ends[1].write(payload)
    return await ends[0].readexactly(len(payload))


async def test_bytes_pass(proxy: Proxy) -> None:
    ends = await connect(proxy)
    assert await echoed(ends, b"hello") == b"hello"
    ends[1].close()


async def test_a_delay_is_felt_and_ends(proxy: Proxy) -> None:
    ends = await connect(proxy)
    proxy.delay_s = 0.1
    began_s = time.monotonic()
    assert await echoed(ends, b"slow") == b"slow"
    assert time.monotonic() - began_s >= 0.2  # there and back
    proxy.pass_again()
    assert await echoed(ends, b"fast") == b"fast"
    ends[1].close()


async def test_a_black_hole_keeps_connections_open_and_gives_nothing_back(proxy: Proxy) -> None:
    ends = await connect(proxy)
    await echoed(ends, b"before")
    proxy.black_hole()
    ends[1].write(b"lost for now")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await ends[0].read(1)
    proxy.pass_again()
    assert await ends[0].readexactly(12) == b"lost for now"
    ends[1].close()


async def test_a_reset_breaks_every_connection_and_new_ones_pass(proxy: Proxy) -> None:
    ends = await connect(proxy)
    await echoed(ends, b"before")
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await ends[0].read(1)
    ends[1].close()
    again = await connect(proxy)
    assert await echoed(again, b"after") == b"after"
    again[1].close()


async def test_a_router_that_is_gone_closes_the_client_s_connection() -> None:
    proxy = Proxy("127.0.0.1:1")
    await proxy.start()
    ends = await connect(proxy)
    assert await ends[0].read() == b""
    ends[1].close()
    await proxy.close()
