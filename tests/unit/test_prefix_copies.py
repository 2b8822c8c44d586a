"""A copy that the core asks for becomes one call of the target's store service, and its end is told and counted, whatever it is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from random import Random
from typing import cast

import grpc.aio
import pytest
from google.protobuf.message import Message
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import CopyPrefix
from router.prefix_copies import PrefixCopies
from router.shell import RouterShell
from tandem.domain import BlockHash, Namespace, RequestId
from tandem.errors import DeadlineError, EngineError, TandemError
from tandem.telemetry import RouterMetrics
from tandem.v1 import store_pb2
from tests.fake_channel import FakeChannel

COPY = CopyPrefix(
    request_id=RequestId("r1"),
    namespace=Namespace("ab" * 16),
    block_hashes=tuple(BlockHash(bytes([number]) * 32) for number in range(4)),
    source_node="a",
    target_node="b",
)


class Bench:
    """A shell that copies between nodes a and b; b's service answers `answer`, an error as such, nothing before `gate` is open."""

    def __init__(self) -> None:
        self.answer: Message | TandemError | None = store_pb2.CopyResponse(copied_blocks=3, held_blocks=4)
        self.asked = list[store_pb2.CopyRequest]()
        self.gate = asyncio.Event()
        self.gate.set()
        self.registry = CollectorRegistry()
        self.shell = RouterShell(RouterConfig(), RouterCore(RouterConfig(), Random(1)), RouterMetrics(self.registry), lambda: 0.0)
        self.channel = FakeChannel({"tandem.v1.Store/Copy": self._copy})
        self.copies = PrefixCopies(self.shell, self)

    def reach(self, node: str) -> tuple[grpc.aio.Channel, str] | None:
        return (cast("grpc.aio.Channel", self.channel), f"{node}:1") if node in ("a", "b") else None

    async def _copy(self, payload: bytes) -> Message:
        self.asked.append(store_pb2.CopyRequest.FromString(payload))
        await self.gate.wait()
        if isinstance(self.answer, TandemError):
            raise self.answer
        return cast("Message", self.answer)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"tandem_router_{name}_total", labels) or 0.0


async def settle() -> None:
    """Lets every task run as far as it gets by itself."""
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def copying() -> AsyncIterator[Bench]:
    bench = Bench()
    task = asyncio.create_task(bench.copies.run())
    await settle()
    yield bench
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def carried_out(bench: Bench, copy: CopyPrefix = COPY) -> str:
    """Its outcome."""
    bench.shell.on_copy(copy)
    await settle()
    (outcome,) = (one for one in ("copied", "partial", "failed", "timeout") if bench.value("prefix_copies", outcome=one))
    return outcome


async def test_the_target_is_asked_to_copy_from_the_source() -> None:
    async with copying() as bench:
        assert await carried_out(bench) == "copied"
        (asked,) = bench.asked
        assert (asked.from_address, asked.namespace, list(asked.block_hashes)) == ("a:1", COPY.namespace, list(COPY.block_hashes))
        assert bench.value("prefix_copied_blocks") == 3


@pytest.mark.parametrize(
    ("answer", "outcome", "blocks"),
    [
        (store_pb2.CopyResponse(copied_blocks=2, held_blocks=3), "partial", 2),
        (EngineError("no"), "failed", 0),
        (DeadlineError("copy"), "timeout", 0),
    ],
)
async def test_what_does_not_come_whole_is_counted_as_such(answer: Message | TandemError, outcome: str, blocks: int) -> None:
    async with copying() as bench:
        bench.answer = answer
        assert await carried_out(bench) == outcome
        assert bench.value("prefix_copied_blocks") == blocks


@pytest.mark.parametrize("nodes", [("gone", "b"), ("a", "gone")])
async def test_a_node_that_has_left_is_a_failure_and_nobody_is_called(nodes: tuple[str, str]) -> None:
    copy = replace(COPY, source_node=nodes[0], target_node=nodes[1])
    async with copying() as bench:
        assert await carried_out(bench, copy) == "failed"
        assert bench.asked == []


async def test_a_bug_ends_one_copy_and_not_the_next() -> None:
    async with copying() as bench:
        bench.answer = None  # the fake raises AttributeError
        assert await carried_out(bench) == "failed"
        assert bench.value("task_failures", task="prefix_copy") == 1
        bench.answer = store_pb2.CopyResponse(copied_blocks=4, held_blocks=4)
        bench.shell.on_copy(COPY)
        await settle()
        assert bench.value("prefix_copies", outcome="copied") == 1


async def test_nobody_waits_for_a_copy_and_one_that_is_cancelled_is_told_too() -> None:
    async with copying() as bench:
        bench.gate.clear()
        bench.shell.on_copy(COPY)
        await settle()
        assert len(bench.asked) == 1
    assert bench.value("prefix_copies", outcome="failed") == 1


async def test_where_nobody_copies_the_core_hears_that_it_failed() -> None:
    bench = Bench()
    bench.shell.on_copy(COPY)
    assert bench.value("prefix_copies", outcome="failed") == 1
