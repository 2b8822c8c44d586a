"""What each tenant may still use: token buckets filled by slices of a quota that all routers share, and requests in service.

Must not talk to the quota server: it says what to ask for (`asks`), and is told what was granted, or that nobody answered. No clock.

A bucket may go below zero: a request is admitted while the bucket is not empty, its prompt is charged at once and its output as it
streams. Debt is paid from the next slices before anybody else is admitted, so over a long time no more is admitted than was granted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tandem.errors import OverloadedError, Reason
from tandem.tenancy import BURST_S, SliceAsk, Tenant, TokenKind

LOOK_S = 0.25  # between two calls of `asks`
SLICE_S = 2.0  # of a router's own use, asked for at half: one renewal a second
CREDIT_S = 1.0  # of its share of the limit, which a router admits before its first slice has come
_RATE_S = 2.0  # time constant of the measured rates
_RETRY_RUNNING_S = 1.0  # when a request in service may have ended
_RETRY_MAX_S = 3600.0


@dataclass(slots=True)
class _Bucket:
    """One tenant's tokens of one kind on this router."""

    tokens_per_s: float  # the limit of all routers together
    balance: float = 0.0  # slices that came less what was used; below zero: debt
    spent: float = 0.0  # since the last look, as is `granted`
    granted: float = 0.0
    spent_per_s: float = 0.0
    granted_per_s: float = 0.0
    is_dry: bool = False  # the last slice was smaller than asked for

    def spend(self, tokens: float) -> None:
        self.balance -= tokens
        self.spent += tokens

    def take(self, tokens: float, *, is_dry: bool) -> None:
        self.balance += tokens
        self.granted += max(0.0, tokens)
        self.is_dry = is_dry

    def look(self, dt_s: float) -> None:
        """Measures the rates of the last `dt_s`."""
        weight = 1.0 - math.exp(-dt_s / _RATE_S)
        self.spent_per_s += weight * (self.spent / dt_s - self.spent_per_s)
        self.granted_per_s += weight * (self.granted / dt_s - self.granted_per_s)
        self.spent = self.granted = 0.0

    def refill_alone(self, dt_s: float, share: float) -> None:
        """This router's part of the limit, while nobody grants slices."""
        per_s = self.tokens_per_s * share
        self.take(max(0.0, min(per_s * dt_s, BURST_S * per_s - self.balance)), is_dry=True)

    def wanted(self) -> int:
        """Tokens to ask for; below zero: to give back, because so much more is here than is used."""
        target = SLICE_S * min(self.spent_per_s, self.tokens_per_s)
        if target < 1.0:
            target = 1.0 if self.is_dry else 0.0  # else who has paid all debt and no more would never ask again
        if self.balance < target / 2.0:
            return math.ceil(target - self.balance)
        return -math.floor(self.balance - target) if self.balance > 2.0 * target else 0

    def wait_s(self, share: float) -> float:
        """Seconds until a request may be admitted; 0: now."""
        per_s = self.tokens_per_s * share
        missing = -self.balance if self.is_dry else -self.balance - CREDIT_S * per_s
        if missing < 0.0:
            return 0.0
        income_per_s = min(self.tokens_per_s, max(per_s, self.granted_per_s))
        return min(_RETRY_MAX_S, max(LOOK_S, (missing + 1.0) / income_per_s))


@dataclass(slots=True)
class _Account:
    """One tenant on this router."""

    tenant: Tenant
    buckets: Mapping[TokenKind, _Bucket] = field(default_factory=dict)
    running: int = 0


class Quotas:
    """The quotas of all tenants on one router; tenants that are not among them have none. `routers` share each limit."""

    def __init__(self, tenants: Sequence[Tenant] = ()) -> None:
        self.routers = 1
        self.is_alone = False  # nobody grants slices: each router goes on with its part of the limits
        self._accounts = {tenant.name: _Account(tenant, _buckets(tenant)) for tenant in sorted(tenants, key=lambda item: item.name)}
        self._looked_s: float | None = None

    @property
    def has_limits(self) -> bool:
        """Whether any tenant has one."""
        return any(account.buckets or account.tenant.max_running_requests for account in self._accounts.values())

    def balance(self, tenant: str, kind: TokenKind) -> float | None:
        """Tokens the tenant may still use here before the next slice; below zero: debt. None: no limit."""
        bucket = self._accounts[tenant].buckets.get(kind) if tenant in self._accounts else None
        return None if bucket is None else bucket.balance

    def check(self, tenant: str) -> None:
        """Raises OverloadedError, with when to come back, where the tenant may not begin a request now. Changes nothing."""
        account = self._accounts.get(tenant)
        if account is None:
            return
        limit = account.tenant.max_running_requests
        if limit is not None and account.running >= math.ceil(limit / self.routers):
            raise _over(tenant, f"{account.running} requests of it are in service, max_running_requests is {limit}", _RETRY_RUNNING_S)
        waits = {kind: bucket.wait_s(1.0 / self.routers) for kind, bucket in account.buckets.items()}
        longest = max(waits, key=lambda kind: waits[kind], default=None)
        if longest is not None and waits[longest] > 0.0:
            per_minute = account.buckets[longest].tokens_per_s * 60.0
            raise _over(tenant, f"the limit is {per_minute:.0f} {longest} tokens a minute", waits[longest])

    def begin(self, tenant: str, prompt_tokens: int) -> None:
        """A request is in service; its prompt is charged."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.running += 1
            self._spend(account, TokenKind.PROMPT, prompt_tokens)

    def charge_output(self, tenant: str, tokens: int) -> None:
        """So many output tokens more were sent."""
        account = self._accounts.get(tenant)
        if account is not None:
            self._spend(account, TokenKind.OUTPUT, tokens)

    def end(self, tenant: str) -> None:
        """A request that had begun is over."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.running -= 1

    def asks(self, now_s: float) -> tuple[SliceAsk, ...]:
        """What is to be asked of the quota server now, and given back. Call it each LOOK_S, and tell what came of it before the next."""
        dt_s = 0.0 if self._looked_s is None else max(0.0, now_s - self._looked_s)
        self._looked_s = now_s
        asks = []
        for name, account in self._accounts.items():
            for kind, bucket in account.buckets.items():
                if self.is_alone:
                    bucket.refill_alone(dt_s, 1.0 / self.routers)
                if dt_s > 0.0:
                    bucket.look(dt_s)
                wanted = bucket.wanted()
                if wanted:
                    asks.append(SliceAsk(tenant=name, kind=kind, tokens=wanted, tokens_per_s=bucket.tokens_per_s))
        return tuple(asks)

    def granted(self, asks: Sequence[SliceAsk], tokens: Sequence[int]) -> None:
        """The quota server's answer to `asks`: what it gave, and took back (below zero)."""
        if self.is_alone:
            self.is_alone = False
            for account in self._accounts.values():
                for bucket in account.buckets.values():
                    bucket.is_dry = False
        for ask, given in zip(asks, tokens, strict=True):
            self._accounts[ask.tenant].buckets[ask.kind].take(given, is_dry=given < ask.tokens)

    def lost(self) -> None:
        """The quota server does not answer: from now on each router fills its buckets by itself."""
        self.is_alone = True

    @staticmethod
    def _spend(account: _Account, kind: TokenKind, tokens: int) -> None:
        if kind in account.buckets:
            account.buckets[kind].spend(tokens)


def _buckets(tenant: Tenant) -> dict[TokenKind, _Bucket]:
    rates = {kind: tenant.tokens_per_s(kind) for kind in TokenKind}
    return {kind: _Bucket(rate) for kind, rate in rates.items() if rate is not None}


def _over(tenant: str, why: str, retry_after_s: float) -> OverloadedError:
    return OverloadedError(f"tenant {tenant!r} is over its quota: {why}", retry_after_s=retry_after_s, reason=Reason.TENANT_QUOTA)
