"""The task that leases slices: what it asks, what it shows, what it does when nobody answers."""

from collections.abc import Sequence
from random import Random

from prometheus_client import CollectorRegistry

from router.quota import Quotas
from router.quota_leases import QuotaLeases
from tandem.errors import Reason, UnavailableError
from tandem.telemetry import RouterMetrics
from tandem.tenancy import SliceAsk, Tenant, TokenKind

ALICE = Tenant(name="alice", key_sha256=("0" * 64,), prompt_tokens_per_minute=6000)


class FakeServer:
    """Grants everything, or does not answer."""

    def __init__(self) -> None:
        self.is_away = False
        self.calls: list[tuple[list[int], int]] = []

    async def lease(self, asks: Sequence[SliceAsk], routers: int) -> list[int]:
        if self.is_away:
            raise UnavailableError("away", reason=Reason.NO_REGISTER)
        self.calls.append(([ask.tokens for ask in asks], routers))
        return [ask.tokens for ask in asks]

    async def close(self) -> None:
        """Nothing is open."""


class Bench:
    def __init__(self, server: FakeServer | None) -> None:
        self.registry = CollectorRegistry()
        self.quotas = Quotas([ALICE])
        self.now_s = 0.0
        self.routers = 3
        metrics = RouterMetrics(self.registry)
        self.leases = QuotaLeases(self.quotas, server, metrics, lambda: self.routers, Random(1), lambda: self.now_s)

    async def look(self) -> None:
        self.now_s += 0.25
        await self.leases.look()

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"tandem_router_{name}", labels)


async def test_debt_is_asked_for_with_the_routers_that_share_and_nothing_is_asked_when_idle() -> None:
    server = FakeServer()
    bench = Bench(server)
    await bench.look()
    assert server.calls == []
    bench.quotas.begin("alice", 50)
    await bench.look()
    (asked,), routers = server.calls[0]
    assert asked >= 50
    assert routers == 3
    assert bench.sample("quota_leases_total", outcome="ok") == 1


async def test_a_router_that_sees_none_counts_itself() -> None:
    bench = Bench(FakeServer())
    bench.routers = 0
    await bench.look()
    assert bench.quotas.routers == 1


async def test_when_nobody_answers_it_goes_on_alone_says_so_and_comes_back_by_itself() -> None:
    server = FakeServer()
    bench = Bench(server)
    server.is_away = True
    bench.quotas.begin("alice", 50)
    await bench.look()
    await bench.look()
    assert bench.quotas.is_alone
    assert (bench.sample("quota_is_alone"), bench.sample("quota_leases_total", outcome="failed")) == (1.0, 2.0)
    server.is_away = False
    await bench.look()
    assert not bench.quotas.is_alone
    assert bench.sample("quota_is_alone") == 0.0


async def test_it_asks_whether_somebody_is_back_though_it_needs_nothing() -> None:
    server = FakeServer()
    bench = Bench(server)
    bench.quotas.lost()
    for _ in range(20):
        await bench.look()
    assert server.calls
    assert not bench.quotas.is_alone


async def test_without_a_server_it_is_alone_for_good() -> None:
    bench = Bench(None)
    for _ in range(4):
        await bench.look()
    assert bench.sample("quota_is_alone") == 1.0
    assert (bench.quotas.balance("alice", TokenKind.PROMPT) or 0.0) > 0.0
