"""`tandem explain` in front of real routers: it finds a request by whatever id its caller saw."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import NotFoundError, UnavailableError
from tandem.explain_cli import explain
from tests.integration.fake_worker import Faults, serve_workers
from tests.integration.http_router import PROMPT, HttpRouter, serve_http, serve_http_over
from tests.integration.router_shell import CONFIG, Router, message, serve_router

pytestmark = pytest.mark.integration


@asynccontextmanager
async def two_routers() -> AsyncIterator[tuple[HttpRouter, Router]]:
    """Both in front of the same workers; the first with HTTP."""
    async with (
        serve_workers(prefill_0=Faults(), decode_0=Faults()) as workers,
        serve_http_over(workers, CONFIG) as http,
        serve_router(workers, replace(CONFIG, router_id="router-1")) as other,
    ):
        yield http, other


async def explained(request_id: str, folder: Path, *routers: str) -> Any:
    """What the command writes."""
    path = folder / "explain.json"
    await asyncio.to_thread(explain, request_id, endpoint=",".join(routers), timeout_s=10.0, json=path)
    return json.loads(path.read_text())


async def test_a_request_is_found_by_the_id_that_an_http_client_gave_it_and_by_the_answers_own(tmp_path: Path) -> None:
    async with serve_http(prefill_0=Faults(), decode_0=Faults()) as http:
        for seen_id in ("mine", "x" * 124):
            answer = await http.complete(headers={"x-request-id": seen_id, "x-tandem-receipt": "1"})
            assert answer.headers["x-request-id"] == seen_id
            for asked_id in (seen_id, answer.json["id"], answer.json["tandem"]["request_id"]):
                found = await explained(asked_id, tmp_path, http.router.address)
                assert found["request_id"] == found["receipt"]["request_id"] == answer.json["tandem"]["request_id"] != seen_id


async def test_choices_and_prompts_are_found_by_the_id_of_their_call(tmp_path: Path) -> None:
    async with serve_http(prefill_0=Faults(), decode_0=Faults()) as http:
        router = http.router
        output = await router.generate(message(request_id="two", sampling={"max_tokens": 8, "n": 2}))
        assert output.receipt is not None
        assert output.receipt.request_id == "two"
        assert (await explained("two", tmp_path, router.address))["request_id"] == "two#0"
        assert (await explained("two#1", tmp_path, router.address))["request_id"] == "two#1"
        await http.complete(headers={"x-request-id": "four"}, prompt=[PROMPT, PROMPT], n=2)
        found = await explained("four", tmp_path, router.address)
        assert found["request_id"].startswith("four-")
        assert found["request_id"].endswith("#0")


async def test_every_router_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with two_routers() as (http, other):
        await http.router.generate(message(request_id="here"))
        await other.generate(message(request_id="there"))
        addresses = (http.router.address, other.address)
        for request_id in ("here", "there"):
            assert (await explained(request_id, tmp_path, *addresses))["request_id"] == request_id
        assert "fetched_tokens" in capsys.readouterr().out
        assert (await explained("there", tmp_path, "127.0.0.1:1", *addresses))["request_id"] == "there"
        with pytest.raises(NotFoundError, match="'nowhere'"):
            await explained("nowhere", tmp_path, *addresses)
        with pytest.raises(UnavailableError):
            await explained("nowhere", tmp_path, *addresses, "127.0.0.1:1")
