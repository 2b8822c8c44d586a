"""The task that exchanges shares between routers, on a server of a few lines."""

import logging
from collections.abc import Mapping
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.share_exchange import ShareExchange, read_shares
from router.tenants import RouterShares
from tandem.errors import Reason, UnavailableError
from tandem.telemetry import RouterMetrics


class Server:
    """Answers `others`, or not at all."""

    def __init__(self) -> None:
        self.told: list[Mapping[str, object]] = []
        self.others: dict[str, Mapping[str, object]] = {}
        self.is_lost = False

    async def exchange(self, told: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
        if self.is_lost:
            raise UnavailableError("gone", reason=Reason.NO_REGISTER)
        self.told.append(told)
        return self.others

    async def close(self) -> None:
        """Nothing to close."""


class Core(RouterCore):
    """Keeps what it hears."""

    def __init__(self) -> None:
        super().__init__(RouterConfig(), Random(1))
        self.heard: list[Mapping[str, RouterShares]] = []

    def shares_heard(self, others: Mapping[str, RouterShares]) -> None:
        self.heard.append(others)


def parts(routers: int = 2) -> tuple[Core, Server, ShareExchange]:
    core, server = Core(), Server()
    return core, server, ShareExchange(core, server, RouterMetrics(CollectorRegistry()), lambda: routers)


async def test_a_round_tells_and_hears() -> None:
    core, server, exchange = parts()
    server.others = {"r2": {"served": {"a": 5}, "counters": {"a": 7}, "waiting": ["a"], "floor": 2}, "bad": {"served": 1}}
    await exchange.exchange()
    assert server.told == [{"served": {}, "counters": {}, "waiting": (), "floor": 0.0}]
    assert core.heard == [{"r2": RouterShares(served={"a": 5.0}, counters={"a": 7.0}, waiting=("a",), floor=2.0)}]


async def test_one_router_alone_asks_nobody() -> None:
    core, server, exchange = parts(routers=1)
    await exchange.exchange()
    assert (core.heard, server.told) == ([], [])


async def test_a_server_that_is_lost_is_told_once_and_its_routers_wait_for_nobody(caplog: pytest.LogCaptureFixture) -> None:
    core, server, exchange = parts()
    server.others = {"r2": {"served": {}, "counters": {}, "waiting": ["a"], "floor": 0.0}}
    await exchange.exchange()
    server.is_lost = True
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await exchange.exchange()
    assert core.heard == [{"r2": RouterShares(served={}, counters={}, waiting=("a",), floor=0.0)}, {}]
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"served": {}, "counters": {}, "waiting": []},
        {"served": [], "counters": {}, "waiting": [], "floor": 0},
        {"served": {}, "counters": {}, "waiting": [1], "floor": 0},
        {"served": {"a": "x"}, "counters": {}, "waiting": [], "floor": 0},
        {"served": {"a": float("nan")}, "counters": {}, "waiting": [], "floor": 0},
        {"served": {}, "counters": {"a": float("inf")}, "waiting": [], "floor": 0},
        {"served": {}, "counters": {}, "waiting": [], "floor": float("nan")},
    ],
)
def test_what_no_router_tells_is_left_out(value: Mapping[str, object]) -> None:
    assert read_shares(value) is None
