"""The shell asks a request's tenant's quota before the core, and charges it for what is admitted and sent."""

from random import Random

import pytest
from prometheus_client import CollectorRegistry

from router.config import RouterConfig
from router.core import RouterCore
from router.quota import Quotas
from router.shell import RouterShell
from router.ticket import Ticket
from tandem.deadline import Deadline
from tandem.domain import Request
from tandem.errors import InvalidRequestError, OverloadedError, Reason
from tandem.telemetry import RouterMetrics
from tandem.tenancy import Tenant, TokenKind
from tests.samples import make_lease, make_request

PROMPT, OUTPUT = TokenKind.PROMPT, TokenKind.OUTPUT
NEVER = Deadline(None)


class Bench:
    """A shell with one replica and one tenant of these limits; nothing is leased."""

    def __init__(self, *, max_queued_requests: int = 100, **limits: int) -> None:
        self.quotas = Quotas([Tenant(name="alice", key_sha256=("0" * 64,), **limits)])  # type: ignore[arg-type]
        config = RouterConfig(max_queued_requests=max_queued_requests)
        metrics = RouterMetrics(CollectorRegistry())
        self.shell = RouterShell(config, RouterCore(config, Random(1)), metrics, lambda: 0.0, self.quotas)
        self.shell.models_held(["m"])  # type: ignore[list-item]
        self.shell.replica_seen(make_lease())

    def submit(self, request: Request, *, is_begun: bool = False) -> Ticket:
        return self.shell.submit(request, (), NEVER, is_begun=is_begun)


def request(number: int = 0, tenant: str = "alice") -> Request:
    return make_request(f"r{number}", prompt_tokens=100, tenant=tenant)


async def test_a_prompt_is_charged_at_arrival_and_output_as_it_is_sent() -> None:
    bench = Bench(prompt_tokens_per_minute=6000, output_tokens_per_minute=6000)
    ticket = bench.submit(request())
    bench.shell.sent(ticket, 3)
    assert (bench.quotas.balance("alice", PROMPT), bench.quotas.balance("alice", OUTPUT)) == (-100.0, -3.0)
    bench.shell.close(ticket)


async def test_over_the_quota_nothing_reaches_the_core_and_other_tenants_go_on() -> None:
    bench = Bench(prompt_tokens_per_minute=600)
    bench.shell.close(bench.submit(request(1)))
    with pytest.raises(OverloadedError) as caught:
        bench.submit(request(2))
    assert caught.value.reason is Reason.TENANT_QUOTA
    assert caught.value.retry_after_s is not None
    assert (bench.shell.core.running_requests, bench.shell.core.queued_requests) == (0, 0)
    bench.shell.close(bench.submit(request(3, tenant="default")))


async def test_a_further_choice_is_never_refused_and_its_prompt_is_charged_once() -> None:
    bench = Bench(prompt_tokens_per_minute=600, max_running_requests=1)
    tickets = [bench.submit(request(1)), bench.submit(request(2), is_begun=True)]
    assert bench.quotas.balance("alice", PROMPT) == -100.0
    for ticket in tickets:
        bench.shell.close(ticket)


async def test_requests_in_service_are_counted_to_their_end() -> None:
    bench = Bench(max_running_requests=1)
    first = bench.submit(request(1))
    with pytest.raises(OverloadedError):
        bench.submit(request(2))
    bench.shell.close(first)
    bench.shell.close(bench.submit(request(2)))


async def test_who_is_refused_at_once_for_another_reason_pays_nothing() -> None:
    bench = Bench(prompt_tokens_per_minute=60_000, max_running_requests=2)
    kept = bench.submit(request(1))
    with pytest.raises(InvalidRequestError):
        bench.submit(request(1))
    unknown = make_request("r9", model="other", tenant="alice")
    refused = bench.submit(unknown)
    assert bench.quotas.balance("alice", PROMPT) == -100.0
    for ticket in (kept, refused):
        bench.shell.close(ticket)
    for number in (2, 3):
        bench.quotas.check("alice")
        bench.quotas.begin("alice", number)
