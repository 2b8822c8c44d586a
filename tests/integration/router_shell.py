"""A router on loopback in front of fake workers, and a client that joins its streams."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from router.access import Access
from router.config import RouterConfig
from router.core import RouterCore
from router.frontend import Frontend
from router.server import services
from router.shell import RouterShell
from router.tokenizer import Tokenizers
from router.workers import Workers
from tandem import convert, rpc
from tandem.domain import Receipt, Request, Sampling, Usage
from tandem.errors import TandemError
from tandem.telemetry import RouterMetrics
from tandem.tenancy import Tenant
from tandem.v1 import common_pb2, inference_pb2
from tests.integration.fake_worker import FakeWorker, expected_token
from tests.samples import make_request

GENERATE = "tandem.v1.Inference/Generate"
CONFIG = RouterConfig(
    one_worker_max_tokens=0, tick_s=0.01, no_replica_wait_s=0.3, retry_hold_s=0.1, watch_silence_s=2.5, reconnect_max_s=0.2
)


@dataclass
class Output:
    """What one call brought."""

    tokens: dict[int, list[int]] = field(default_factory=dict)  # by choice
    messages: int = 0
    finish_reason: int = common_pb2.FINISH_REASON_UNSPECIFIED
    usage: Usage | None = None
    receipt: Receipt | None = None


class Router:
    """The router under test."""

    def __init__(
        self, shell: RouterShell, frontend: Frontend, registry: CollectorRegistry, channel: grpc.aio.Channel, address: str
    ) -> None:
        self.shell = shell
        self.frontend = frontend
        self.registry = registry
        self.channel = channel
        self.address = address

    async def generate(
        self, message: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0, *, into: Output | None = None
    ) -> Output:
        """One call to its end; tokens must come at the next position, each once."""
        output = Output() if into is None else into
        async with rpc.open_stream(self.channel, GENERATE, message, timeout_s=timeout_s) as stream:
            async for payload in stream:
                chunk = convert.chunk_from_pb(inference_pb2.GenerateResponse.FromString(payload))
                tokens = output.tokens.setdefault(chunk.choice_index, [])
                assert not chunk.token_ids or chunk.first_position == message.first_position + len(tokens)
                tokens.extend(chunk.token_ids)
                output.messages += 1
                output.finish_reason = convert.finish_reason_to_pb(chunk.finish_reason)
                output.usage = chunk.usage
            receipt = await stream.receipt()
        output.receipt = None if receipt is None else convert.receipt_from_pb(common_pb2.Receipt.FromString(receipt))
        return output

    async def becomes_idle(self) -> None:
        """Waits until the router holds nothing, and checks its books."""
        core = self.shell.core
        await eventually(lambda: not (self.shell._calls or core.running_requests or core.queued_requests))
        self.shell.core.check_invariants()
        assert not self.shell._tickets

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 where there is none."""
        return self.registry.get_sample_value(name, labels) or 0.0


def message(
    prompt_tokens: int = 100, max_tokens: int = 8, request_id: str = "", model: str = "m", **fields: object
) -> inference_pb2.GenerateRequest:
    """A request by token ids."""
    ids = inference_pb2.TokenIds(ids=range(1, prompt_tokens + 1))
    sampling = common_pb2.Sampling(max_tokens=max_tokens)
    return inference_pb2.GenerateRequest(**{"request_id": request_id, "model": model, "token_ids": ids, "sampling": sampling} | fields)  # type: ignore[arg-type]


def expected(request: Request, first: int = 0, choice: int = 0) -> list[int]:
    """The whole output a request must have from position `first` on."""
    assert request.sampling.max_tokens is not None
    return [expected_token(request, position, choice) for position in range(first, request.sampling.max_tokens)]


async def eventually(is_so: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Waits until the other side of a socket has caught up; raises TimeoutError where it does not."""
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110  # the state belongs to the code under test, which has no event for it
            await asyncio.sleep(0.01)


def sample_request(prompt_tokens: int = 100, max_tokens: int = 8) -> Request:
    """The domain's side of `message`, to compute what is expected of it."""
    return make_request(prompt_tokens=prompt_tokens, sampling=Sampling(max_tokens=max_tokens))


async def refused(router: Router, request: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0) -> TandemError:
    """The error a call ends with, after which the router holds nothing."""
    with pytest.raises(TandemError) as caught:
        await router.generate(request, timeout_s)
    await router.becomes_idle()
    return caught.value


@asynccontextmanager
async def serve_router(
    workers: dict[str, FakeWorker],
    config: RouterConfig = CONFIG,
    *,
    is_waiting: bool = True,
    tenants: Sequence[Tenant] = (),
    core: RouterCore | None = None,
) -> AsyncIterator[Router]:
    """A router on a free port; `is_waiting`: until it has seen all workers."""
    addresses = [worker.server.address for worker in workers.values() if worker.server is not None]
    registry = CollectorRegistry()
    shell = RouterShell(config, RouterCore(config, Random(1)) if core is None else core, RouterMetrics(registry))
    pool = Workers(addresses, shell, Random(2))
    frontend = Frontend(shell, pool, Tokenizers())
    access = Access(tenants, shell.metrics)
    server = await rpc.start_server("127.0.0.1", 0, services(shell, pool, frontend, None, access))
    channel = rpc.open_channel(server.address)
    tasks = [asyncio.create_task(shell.tick_forever()), asyncio.create_task(pool.watch_forever())]
    try:
        await eventually(lambda: not is_waiting or len(shell.core.fleet.leases) == len(workers))
        yield Router(shell, frontend, registry, channel, server.address)
    finally:
        await channel.close(None)
        await server.stop(0.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
