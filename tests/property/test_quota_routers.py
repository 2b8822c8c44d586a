"""Several routers on one quota, in simulated time: together they admit the limit, whatever their loads and moments are."""

from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.quota import LOOK_S, Quotas
from tandem.errors import OverloadedError
from tandem.tenancy import BURST_S, SliceAsk, Tenant, TokenKind

TICK_S = 0.05
MAX_REQUESTS_PER_S = 50.0  # of a load of once the limit: else an example takes minutes


class BucketServer:
    """The script of `tandem/redis_quota.py` in Python, for one bucket."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.room = max(1.0, rate * BURST_S)
        self.level = self.first = min(self.room, max(1.0, rate))
        self.at_s = 0.0

    def lease(self, ask: SliceAsk, routers: int, now_s: float) -> int:
        self.level = min(self.room, self.level + self.rate * (now_s - self.at_s))
        self.at_s = now_s
        given = ask.tokens
        if given > 0:
            given = min(given, int(self.level if self.level >= self.room / 2 else self.level / routers))
        self.level = min(self.room, self.level - given)
        return given


@example(seed=0, loads=[2.5], per_minute=600, request_tokens=104)  # whose debt is paid to the token
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    loads=st.lists(st.floats(0.0, 4.0), min_size=1, max_size=5),
    per_minute=st.integers(600, 600_000),
    request_tokens=st.integers(1, 4000),
)
def test_together_they_admit_no_more_than_the_limit_and_all_of_it_under_load(
    seed: int, loads: list[float], per_minute: int, request_tokens: int
) -> None:
    rng, rate, seconds = Random(seed), per_minute / 60.0, 120.0
    request_tokens = max(request_tokens, round(rate / MAX_REQUESTS_PER_S))
    tenant = Tenant(name="t", key_sha256=("0" * 64,), prompt_tokens_per_minute=per_minute)
    server, routers = BucketServer(rate), [Quotas([tenant]) for _ in loads]
    for router in routers:
        router.routers = len(routers)
    looks_s = [rng.uniform(0.0, LOOK_S) for _ in loads]
    sent = [0.0] * len(loads)
    admitted = 0
    for tick in range(round(seconds / TICK_S)):
        now_s = tick * TICK_S
        for index, router in enumerate(routers):
            while sent[index] < loads[index] * rate * now_s:
                sent[index] += request_tokens
                try:
                    router.check("t")
                except OverloadedError:
                    continue
                router.begin("t", request_tokens)
                router.end("t")
                admitted += request_tokens
            if now_s >= looks_s[index]:
                asks = router.asks(now_s)
                router.granted(asks, [server.lease(ask, len(routers), now_s) for ask in asks])
                looks_s[index] = now_s + LOOK_S * rng.uniform(0.8, 1.2)
    credit = rate + request_tokens * len(routers)  # of all routers before their first slice, and one request each into debt
    assert admitted <= rate * seconds + server.first + credit
    demand = sum(min(load, 4.0) for load in loads)
    if demand >= 2.0:
        assert admitted >= 0.95 * rate * seconds
    held = sum(router.balance("t", TokenKind.PROMPT) or 0.0 for router in routers)
    assert held <= 4.0 * rate * len(routers)
