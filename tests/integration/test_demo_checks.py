"""The demonstration's look at HTTP, against a server that takes everything."""

import pytest
from aiohttp import web

from tandem.demo.checks import check_http
from tests.integration.http_router import serving

pytestmark = pytest.mark.integration


async def _complete(request: web.Request) -> web.Response:
    body = await request.json()
    if body.get("stream"):
        return web.Response(text='data: {"choices": [{"text": "x"}]}\n\ndata: [DONE]\n\n')
    return web.json_response({"choices": [{"text": "x", "message": {"content": "x"}}]})


async def test_a_server_that_takes_a_wrong_temperature_fails_the_check() -> None:
    routes = (web.post("/v1/completions", _complete), web.post("/v1/chat/completions", _complete))
    async with serving(*routes) as address:
        assert await check_http(f"http://{address}", "m") is False
