"""Tenants at both edges of a router: whose key it is, what needs none, what only operators may do."""

import asyncio
from typing import Any

import grpc.aio
import pytest

from tandem import rpc
from tandem.client import AsyncClient
from tandem.domain import ReplicaTarget, Role
from tandem.errors import AuthenticationError, NotFoundError, PermissionDeniedError, Reason, TandemError
from tandem.sync_client import Client
from tandem.tenancy import Tenant, hash_key
from tandem.v1 import inference_pb2
from tests.integration.fake_worker import Faults, serve_workers
from tests.integration.http_router import serve_http
from tests.integration.router_shell import GENERATE, message, serve_router

pytestmark = pytest.mark.integration

TENANTS = (
    Tenant(name="alice", key_sha256=(hash_key("sk-alice"),)),
    Tenant(name="root", key_sha256=(hash_key("sk-root"),), is_operator=True),
)
WRONG = ["", "sk-alicf", "sk-alice2"]
TARGETS = [ReplicaTarget(model="m", role=Role.DECODE, replicas=1)]  # type: ignore[arg-type]
PROMPT = list(range(1, 101))


def keyed(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_a_key_gives_an_sdk_call_its_tenant() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers, tenants=TENANTS) as router:
        async with AsyncClient(router.address, api_key="sk-alice") as client:
            completion = await client.generate(PROMPT, max_tokens=4)
            assert completion.receipt is not None
            assert [card.id for card in await client.models()] == ["m"]
        assert router.metric("tandem_router_tenant_requests_total", tenant="alice", outcome="ok") == 1
        assert router.metric("tandem_router_tenant_prompt_tokens_total", tenant="alice") == 100
        assert router.metric("tandem_router_tenant_output_tokens_total", tenant="alice") == 4


@pytest.mark.parametrize("key", WRONG)
async def test_an_sdk_call_without_a_valid_key_is_refused_and_takes_nothing(key: str) -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers, tenants=TENANTS) as router:
        async with AsyncClient(router.address, api_key=key) as client:
            for call in (client.generate(PROMPT), client.models(), client.scale(TARGETS), client.drain("decode-0")):
                with pytest.raises(AuthenticationError) as caught:
                    await call
                assert caught.value.reason is Reason.BAD_KEY
                assert not key or key not in caught.value.message
        assert router.metric("tandem_router_unauthenticated_total") == 4
        assert not router.shell.demand()["m"].requests_total  # type: ignore[index]


async def test_the_variable_gives_both_clients_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "sk-alice")
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers, tenants=TENANTS) as router:
        async with AsyncClient(router.address) as client:
            await client.generate(PROMPT, max_tokens=2)

        def ask() -> None:
            with Client(router.address) as blocking:
                blocking.generate(PROMPT, max_tokens=2)
            with Client(router.address, api_key="sk-other") as blocking, pytest.raises(AuthenticationError):
                blocking.models()

        await asyncio.to_thread(ask)
        assert router.metric("tandem_router_tenant_requests_total", tenant="alice", outcome="ok") == 2


async def test_only_an_operator_may_scale_and_drain_and_everybody_may_look() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers, tenants=TENANTS) as router:
        async with AsyncClient(router.address, api_key="") as client:
            assert (await client.status()).replicas
        async with AsyncClient(router.address, api_key="sk-alice") as client:
            for call in (client.scale(TARGETS), client.drain("decode-0")):
                with pytest.raises(PermissionDeniedError, match="'alice' is no operator"):
                    await call
        async with AsyncClient(router.address, api_key="sk-root") as client:
            with pytest.raises(NotFoundError):
                await client.drain("nobody")
            with pytest.raises(TandemError) as caught:
                await client.scale(TARGETS)
            assert caught.value.reason is Reason.NO_REGISTER


async def test_a_key_in_grpc_metadata_is_all_that_another_client_needs() -> None:
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers, tenants=TENANTS) as router:
        payload = message(max_tokens=1).SerializeToString()
        generate = router.channel.unary_stream(f"/{GENERATE}", None, None)
        answer = [part async for part in generate(payload, metadata=(("authorization", "bearer sk-alice"),))]
        assert inference_pb2.GenerateResponse.FromString(answer[0]).token_ids
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [part async for part in generate(payload, metadata=(("authorization", "Basic sk-alice"),))]
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert rpc.from_rpc_error(caught.value).reason is Reason.BAD_KEY


@pytest.mark.parametrize("headers", [{}, *(keyed(key) for key in WRONG), {"Authorization": "Basic sk-alice"}])
async def test_http_without_a_valid_key_is_401_with_the_error_object_of_openai(headers: dict[str, str]) -> None:
    async with serve_http(decode_0=Faults(), tenants=TENANTS) as http:
        asked: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/v1/completions", {"json": {"prompt": [1, 2, 3]}}),
            ("POST", "/v1/chat/completions", {"json": {"messages": [{"role": "user", "content": "x"}]}}),
            ("POST", "/v1/completions", {"data": b"no JSON"}),
            ("GET", "/v1/models", {}),
            ("GET", "/v1/models/m", {}),
        ]
        for method, path, options in asked:
            answer = await http.ask(method, path, headers=headers, **options)
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert (answer.error["type"], answer.error["code"]) == ("authentication_error", "invalid_api_key")
            assert "sk-" not in answer.error["message"]
        assert http.router.metric("tandem_router_unauthenticated_total") == len(asked)


async def test_http_with_a_key_is_served_and_what_operators_ask_needs_none() -> None:
    async with serve_http(decode_0=Faults(), tenants=TENANTS) as http:
        assert (await http.complete(keyed("sk-alice"), max_tokens=2)).status == 200
        assert (await http.ask("GET", "/v1/models", headers=keyed("sk-root"))).status == 200
        for path in ("/health", "/metrics", "/sd", "/version"):
            assert (await http.ask("GET", path)).status == 200
        assert (await http.ask("GET", "/v1/nothing")).status == 404
        assert http.router.metric("tandem_router_tenant_requests_total", tenant="alice", outcome="ok") == 1


async def test_a_tenant_in_the_body_or_a_header_counts_for_nothing() -> None:
    async with serve_http(decode_0=Faults(), tenants=TENANTS) as http:
        answer = await http.complete({**keyed("sk-alice"), "x-tenant-id": "root"}, max_tokens=1, tenant="root", user="root")
        assert answer.status == 200
        assert http.router.metric("tandem_router_tenant_requests_total", tenant="alice", outcome="ok") == 1


async def test_without_tenants_a_key_is_not_asked_for_and_does_no_harm() -> None:
    async with serve_http(decode_0=Faults()) as http:
        assert (await http.complete(max_tokens=1)).status == 200
        assert (await http.complete(keyed("sk-any"), max_tokens=1)).status == 200
        assert http.router.metric("tandem_router_tenant_requests_total", tenant="default", outcome="ok") == 2
