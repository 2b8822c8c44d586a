"""What a router admits of a tenant, what it asks for and gives back, when a refused caller may come again."""

from collections.abc import Sequence

import pytest

from router.quota import CREDIT_S, LOOK_S, Quotas
from tandem.errors import Code, OverloadedError, Reason
from tandem.tenancy import BURST_S, SliceAsk, Tenant, TokenKind

PROMPT, OUTPUT = TokenKind.PROMPT, TokenKind.OUTPUT
PER_S = 100.0
DIGEST = ("0" * 64,)
ALICE = Tenant(name="alice", key_sha256=DIGEST, prompt_tokens_per_minute=6000, output_tokens_per_minute=6000)
FEW = Tenant(name="few", key_sha256=DIGEST, max_running_requests=3)
FREE = Tenant(name="free", key_sha256=DIGEST)


def refusal(quotas: Quotas, tenant: str = "alice") -> OverloadedError:
    with pytest.raises(OverloadedError) as caught:
        quotas.check(tenant)
    assert (caught.value.code, caught.value.reason, caught.value.retryable) == (Code.RESOURCE_EXHAUSTED, Reason.TENANT_QUOTA, True)
    return caught.value


def wait_s(quotas: Quotas) -> float:
    wait = refusal(quotas).retry_after_s
    assert wait is not None
    return wait


class Bench:
    """One router's quotas at a time that the test moves on; a server that gives `part` of what is asked for."""

    def __init__(self, *tenants: Tenant, routers: int = 1) -> None:
        self.quotas = Quotas(tenants or (ALICE,))
        self.quotas.routers = routers
        self.now_s = 0.0
        self.part = 1.0
        self.asked: list[Sequence[SliceAsk]] = []

    def look(self, dt_s: float = LOOK_S) -> dict[tuple[str, TokenKind], int]:
        """One round; what was asked for."""
        self.now_s += dt_s
        asks = self.quotas.asks(self.now_s)
        self.asked.append(asks)
        self.quotas.granted(asks, [int(ask.tokens * self.part) if ask.tokens > 0 else ask.tokens for ask in asks])
        return {(ask.tenant, ask.kind): ask.tokens for ask in asks}


def test_who_has_no_limit_or_is_not_known_is_never_refused() -> None:
    quotas = Quotas((FREE,))
    for tenant in ("free", "stranger"):
        for _ in range(100):
            quotas.check(tenant)
            quotas.begin(tenant, 10**9)
            quotas.charge_output(tenant, 10**9)
        quotas.end(tenant)
        assert quotas.balance(tenant, PROMPT) is None
    assert not quotas.has_limits
    assert Quotas((FEW,)).has_limits
    assert quotas.asks(1.0) == ()


def test_the_first_requests_need_no_slice_and_the_credit_ends() -> None:
    quotas = Quotas((ALICE,))
    assert quotas.has_limits
    quotas.check("alice")
    quotas.begin("alice", int(PER_S * CREDIT_S))
    assert wait_s(quotas) == LOOK_S
    assert quotas.balance("alice", PROMPT) == -100.0


def test_several_routers_share_the_credit() -> None:
    quotas = Quotas((ALICE,))
    quotas.routers = 4
    quotas.begin("alice", 25)
    refusal(quotas)


def test_a_prompt_larger_than_all_that_is_left_is_admitted_and_paid_for_before_the_next() -> None:
    bench = Bench()
    bench.quotas.check("alice")
    bench.quotas.begin("alice", 5000)
    bench.part = 0.1
    bench.look()
    assert 40.0 < wait_s(bench.quotas) <= 45.1
    bench.part = 1.0
    bench.look()
    bench.quotas.check("alice")


def test_output_delays_the_next_request_and_ends_none() -> None:
    bench = Bench()
    bench.part = 0.0
    bench.quotas.begin("alice", 0)
    bench.quotas.charge_output("alice", 500)
    bench.quotas.charge_output("alice", 500)
    bench.look()
    error = refusal(bench.quotas)
    assert error.message == "tenant 'alice' is over its quota: the limit is 6000 output tokens a minute"
    assert error.retry_after_s == pytest.approx(10.01)


def test_the_wait_is_longer_where_other_routers_take_their_part_and_as_measured_where_they_do_not() -> None:
    waits = []
    for routers in (1, 2):
        bench = Bench(routers=routers)
        bench.part = 0.0
        bench.quotas.begin("alice", 999)
        bench.look()
        waits.append(wait_s(bench.quotas))
    assert waits == [pytest.approx(10.0), pytest.approx(20.0)]
    while bench.now_s < 12.0:  # the other one asks for nothing: all that flows in comes here
        bench.now_s += 0.25
        asks = [ask for ask in bench.quotas.asks(bench.now_s) if ask.kind is PROMPT]
        bench.quotas.begin("alice", 25)
        bench.quotas.granted(asks, [25] * len(asks))
    assert wait_s(bench.quotas) == pytest.approx(10.0, rel=0.1)


def test_no_wait_is_longer_than_an_hour() -> None:
    bench = Bench()
    bench.part = 0.0
    bench.quotas.begin("alice", 10**9)
    bench.look()
    assert wait_s(bench.quotas) == 3600.0


def test_a_steady_tenant_renews_its_slice_about_once_a_second() -> None:
    bench = Bench()
    for _ in range(200):
        bench.quotas.check("alice")
        bench.quotas.begin("alice", 20)
        bench.look()
    steady = bench.asked[-40:]  # ten seconds
    renewals = [ask for asks in steady for ask in asks if ask.kind is PROMPT]
    assert 7 <= len(renewals) <= 13
    assert all(ask.tokens > 0 for ask in renewals)
    balance = bench.quotas.balance("alice", PROMPT)
    assert balance is not None
    assert 0.0 < balance <= 200.0


def test_it_asks_before_it_runs_dry() -> None:
    bench = Bench()
    for step in range(200):
        bench.quotas.begin("alice", 20)
        balance = bench.quotas.balance("alice", PROMPT)
        assert step < 40 or (balance is not None and balance > 0.0)
        bench.look()


def test_what_is_not_used_is_given_back_to_the_last_token() -> None:
    bench = Bench()
    for _ in range(100):
        bench.quotas.begin("alice", 20)
        bench.look()
    given_back = [bench.look() for _ in range(200)]
    assert any(tokens < 0 for asks in given_back for tokens in asks.values())
    assert bench.quotas.balance("alice", PROMPT) == pytest.approx(0.0, abs=1.0)
    assert bench.look() == {}
    bench.quotas.check("alice")


def test_nobody_hoards_more_than_two_seconds_of_the_limit() -> None:
    bench = Bench()
    bench.quotas.begin("alice", 100_000)
    assert bench.look()["alice", PROMPT] > 100_000 - 1  # the debt
    for _ in range(10):
        bench.look()
        balance = bench.quotas.balance("alice", PROMPT)
        assert balance is not None
        assert balance <= 2.0 * 2.0 * PER_S


def test_requests_in_service_have_a_bound_that_routers_share() -> None:
    bench = Bench(FEW, routers=2)
    for _ in range(2):
        bench.quotas.check("few")
        bench.quotas.begin("few", 10)
    error = refusal(bench.quotas, "few")
    assert "2 requests of it are in service, max_running_requests is 3" in error.message
    assert error.retry_after_s == 1.0
    bench.quotas.end("few")
    bench.quotas.check("few")
    bench.quotas.routers = 1
    bench.quotas.begin("few", 10)
    bench.quotas.check("few")


def test_alone_a_router_fills_its_buckets_by_its_part_up_to_its_part_of_the_burst() -> None:
    bench = Bench(routers=2)
    bench.quotas.lost()
    bench.quotas.begin("alice", 500)
    bench.quotas.asks(0.0)
    bench.quotas.asks(4.0)
    assert bench.quotas.balance("alice", PROMPT) == -300.0
    assert wait_s(bench.quotas) == pytest.approx(301 / 50, rel=0.01)
    bench.quotas.asks(10.1)
    bench.quotas.check("alice")
    bench.quotas.asks(10_000.0)
    assert bench.quotas.balance("alice", PROMPT) == BURST_S * PER_S / 2
    assert bench.quotas.is_alone


def test_more_than_the_burst_that_was_granted_before_is_kept_when_it_is_left_alone() -> None:
    bench = Bench(routers=4)
    bench.quotas.granted([SliceAsk(tenant="alice", kind=PROMPT, tokens=900, tokens_per_s=PER_S)], [900])
    bench.quotas.lost()
    bench.quotas.asks(0.0)
    bench.quotas.asks(5.0)
    assert bench.quotas.balance("alice", PROMPT) == 900.0


def test_when_the_server_is_back_the_slices_count_again() -> None:
    bench = Bench(routers=2)
    bench.quotas.lost()
    bench.quotas.asks(0.0)
    bench.quotas.asks(1.0)
    bench.quotas.begin("alice", 51)
    refusal(bench.quotas)
    bench.quotas.granted((), ())
    assert not bench.quotas.is_alone
    bench.quotas.check("alice")


def test_a_clock_that_stands_still_is_no_harm() -> None:
    bench = Bench()
    bench.look(0.0)
    bench.quotas.begin("alice", 50)
    assert bench.look(0.0) == {("alice", PROMPT): 50}
