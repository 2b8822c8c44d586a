"""Fair shares between tenants: a virtual counter of the tokens each was served, divided by its weight. Least served goes first.

Must not know requests, queues or quotas: the core says who waits and what was served. Virtual Token Counter (Sheng et al., "Fairness in
Serving Large Language Models", OSDI 2024, algorithm 2). O(active tenants) to activate, O(n log n) to order, O(1) to charge.

While two tenants both wait, the counters of the two differ by no more than what one of them can have running at once, so what they are
served stays in the ratio of their weights within that bound, however long they wait. Routers tell each other what they served and who waits
there (`heard`): a tenant that is ahead of one that waits elsewhere lets that one go first, and the bound grows by what is served between
two exchanges. They tell their counters as well, and each goes by the greater: who was lifted at one router is lifted at all, so that their
counters come together. A prompt that is refunded after another router has heard of it may stay charged.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PROMPT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0  # a decode step reads all weights and KV for one token of each sequence (w_q = 2 w_p in the paper)
MAX_IDLE_TENANTS = 1024
_STEP_FADE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterShares:
    """What one router tells the others: weighted tokens that each tenant was served by it so far and has by its counter, and who waits.

    `floor` is where a tenant begins that comes when nobody else has requests.
    """

    served: Mapping[str, float]
    counters: Mapping[str, float]
    waiting: tuple[str, ...]
    floor: float


class FairShares:
    """Counters in weighted tokens: prompt tokens nobody had in cache, and twice the output tokens, by weight. Unknown weights are 1.

    A tenant is active while a request of it waits or runs. The counters of `max_idle` idle ones are remembered; the least served are
    forgotten first, who would be lifted to the others when they come back anyway.
    """

    def __init__(self, weights: Mapping[str, float], *, max_idle: int = MAX_IDLE_TENANTS) -> None:
        self._weights = dict(weights)
        self._max_idle = max_idle
        self._counters: dict[str, float] = {}  # of active tenants and remembered ones
        self._active: set[str] = set()
        self._floor = 0.0  # where the last one stood when nobody was left: who comes next begins there
        self._served: dict[str, float] = {}  # by this router, since its start
        self._heard: dict[str, Mapping[str, float]] = {}  # by each of the others, when it last told
        self._elsewhere: frozenset[str] = frozenset()  # who waits at another router
        self._own: dict[str, float] = {}  # served by this router since it last heard of the others
        self._step = 0.0  # the most that a counter moves from one time to the next: so much the views of two routers may differ

    @property
    def active(self) -> tuple[str, ...]:
        """Active tenants, by name."""
        return tuple(sorted(self._active))

    @property
    def remembered(self) -> int:
        """Idle tenants with a counter."""
        return len(self._counters) - len(self._active)

    def counter(self, tenant: str) -> float:
        """What the tenant was served, in weighted tokens; 0 of one that is not known."""
        return self._counters.get(tenant, 0.0)

    def weight(self, tenant: str) -> float:
        """Its share beside those of others."""
        return self._weights.get(tenant, 1.0)

    def told(self, waiting: Iterable[str]) -> RouterShares:
        """For the other routers; `waiting`: whose requests wait here."""
        floor = max(self._floor, min(map(self.counter, self._active), default=0.0))
        return RouterShares(served=dict(self._served), counters=dict(self._counters), waiting=tuple(sorted(waiting)), floor=floor)

    def heard(self, others: Mapping[str, RouterShares]) -> None:
        """What the other routers say now, each by a name of its own life; one that says nothing any more is not among them."""
        moved = dict(self._own) if self._heard else {}  # else it is all since the start
        for name, shares in others.items():
            known = self._heard.get(name, shares.served)
            for tenant, served in shares.served.items():
                news = served - known.get(tenant, 0.0)
                if self._move(tenant, news):
                    moved[tenant] = moved.get(tenant, 0.0) + news
        for shares in others.values():
            for tenant in shares.waiting:
                if tenant not in self._active and tenant not in self._elsewhere:
                    self._counters[tenant] = self._lifted(tenant)
        for shares in others.values():  # at last: a counter may have in it what another router's news bring
            self._floor = max(self._floor, shares.floor)
            for tenant, counter in shares.counters.items():
                if counter > self.counter(tenant):
                    self._counters[tenant] = counter
        self._forget()
        self._heard = {name: dict(shares.served) for name, shares in others.items()}
        self._elsewhere = frozenset(tenant for shares in others.values() for tenant in shares.waiting)
        self._step = max(_STEP_FADE * self._step, *moved.values(), 0.0)
        self._own.clear()

    def must_wait(self, tenant: str) -> bool:
        """Whether somebody who waits at another router has had less of its share, by more than is served between two exchanges."""
        limit = self.counter(tenant) - self._step
        return any(other != tenant and other in self._counters and self.counter(other) < limit for other in self._elsewhere)

    def activate(self, tenant: str) -> None:
        """The tenant has a request now: lifted to the least served of the active ones, so that idle time earns nothing."""
        if tenant in self._active:
            return
        if not (tenant in self._elsewhere and tenant in self._counters):  # it was lifted when it came there
            self._counters[tenant] = self._lifted(tenant)
        self._active.add(tenant)

    def deactivate(self, tenant: str) -> None:
        """Nothing of the tenant waits or runs any more."""
        if tenant not in self._active:
            return
        self._active.discard(tenant)
        if not self._active:
            self._floor = max(self._floor, self.counter(tenant))
        self._forget()

    def charge_prompt(self, tenant: str, uncached_tokens: int) -> None:
        """A request was dispatched that has to compute so many prompt tokens."""
        self._add(tenant, PROMPT_TOKEN_COST * uncached_tokens)

    def charge_output(self, tenant: str, tokens: int) -> None:
        """So many output tokens more were sent."""
        self._add(tenant, OUTPUT_TOKEN_COST * tokens)

    def refund(self, tenant: str, uncached_tokens: int) -> None:
        """A dispatch failed before its first token: what `charge_prompt` took for it is given back, the next dispatch is charged again."""
        self._add(tenant, -PROMPT_TOKEN_COST * uncached_tokens)

    def order(self, tenants: Iterable[str]) -> list[str]:
        """The tenants, least served first, ties by name."""
        return sorted(tenants, key=lambda tenant: (self.counter(tenant), tenant))

    def _forget(self) -> None:
        """The least served of too many idle ones."""
        too_many = self.remembered - self._max_idle
        if too_many > 0:
            for tenant in self.order(self._counters.keys() - self._active)[:too_many]:
                del self._counters[tenant]
                self._served.pop(tenant, None)

    def _lifted(self, tenant: str) -> float:
        """Its counter, no less than the least of those who have requests, here or elsewhere."""
        active = self._active | (self._elsewhere & self._counters.keys())
        return max(self.counter(tenant), min(map(self.counter, active), default=self._floor))

    def _add(self, tenant: str, cost: float) -> None:
        """This router served it. Of one that is forgotten nothing is kept: what it was served, it was served."""
        weighted = cost / self.weight(tenant)
        if self._move(tenant, weighted):
            self._served[tenant] = self._served.get(tenant, 0.0) + weighted
            self._own[tenant] = self._own.get(tenant, 0.0) + weighted

    def _move(self, tenant: str, weighted: float) -> bool:
        if tenant not in self._counters:
            return False
        self._counters[tenant] += weighted
        return True
