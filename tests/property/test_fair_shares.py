"""Fair shares under any sequence of events: the ratio of weights within the bound, no credit for idle time, counters that only grow."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from router.tenants import OUTPUT_TOKEN_COST, FairShares

NAMES = ("a", "b", "c", "d")
WEIGHTS = {"a": 1.0, "b": 3.0, "c": 0.5}
names = st.sampled_from(NAMES)
tokens = st.integers(0, 5000)


class Server:
    """Runs `slots` requests at once, each one output token a step; every tenant in `backlogged` always has one more that waits."""

    def __init__(self, shares: FairShares, rng: Random, *, slots: int, max_prompt: int, max_output: int) -> None:
        self.shares = shares
        self.rng = rng
        self.slots = slots
        self.max_prompt = max_prompt
        self.max_output = max_output
        self.running: list[tuple[str, int]] = []
        self.served = dict.fromkeys(NAMES, 0.0)

    @property
    def request_cost(self) -> float:
        return self.max_prompt + OUTPUT_TOKEN_COST * self.max_output

    def step(self, backlogged: tuple[str, ...]) -> None:
        while len(self.running) < self.slots:
            tenant = self.shares.order(backlogged)[0]
            prompt = self.rng.randint(1, self.max_prompt)
            self.shares.charge_prompt(tenant, prompt)
            self.served[tenant] += prompt
            self.running.append((tenant, self.rng.randint(1, self.max_output)))
        for tenant, _ in self.running:
            self.shares.charge_output(tenant, 1)
            self.served[tenant] += OUTPUT_TOKEN_COST
        self.running = [(tenant, left - 1) for tenant, left in self.running if left > 1]


servers = st.builds(
    lambda seed, slots, prompt, output: (Random(seed), slots, prompt, output),
    st.integers(0, 2**32),
    st.integers(1, 8),
    st.integers(1, 2000),
    st.integers(1, 50),
)


@given(servers, st.integers(1, 600))
def test_two_backlogged_tenants_are_served_by_their_weights_within_the_bound(made: tuple[Random, int, int, int], steps: int) -> None:
    rng, slots, prompt, output = made
    server = Server(FairShares(WEIGHTS), rng, slots=slots, max_prompt=prompt, max_output=output)
    for name in ("a", "b"):
        server.shares.activate(name)
    for _ in range(steps):
        server.step(("a", "b"))
        # Each was below the other when it was last given a slot; since then it can have gained what it runs, one tenant a full machine.
        bound = slots * server.request_cost / min(WEIGHTS["a"], WEIGHTS["b"])
        assert abs(server.served["a"] / WEIGHTS["a"] - server.served["b"] / WEIGHTS["b"]) <= bound + 1e-6


def test_over_a_long_time_weights_of_one_and_three_are_shares_of_one_and_three() -> None:
    server = Server(FairShares(WEIGHTS), Random(1), slots=8, max_prompt=1000, max_output=100)
    for name in ("a", "b"):
        server.shares.activate(name)
    for _ in range(20_000):
        server.step(("a", "b"))
    assert abs(server.served["b"] / server.served["a"] - 3.0) < 0.05


@given(servers, st.integers(1, 300), st.integers(1, 300))
def test_idle_time_earns_no_credit(made: tuple[Random, int, int, int], alone: int, together: int) -> None:
    rng, slots, prompt, output = made
    server = Server(FairShares({}), rng, slots=slots, max_prompt=prompt, max_output=output)
    server.shares.activate("a")
    for _ in range(alone):
        server.step(("a",))
    server.shares.activate("b")
    before = dict(server.served)
    for _ in range(together):
        server.step(("a", "b"))
        gained = {name: server.served[name] - before[name] for name in ("a", "b")}
        assert gained["b"] - gained["a"] <= slots * server.request_cost + 1e-6


events = st.lists(
    st.one_of(
        st.tuples(st.just("activate"), names, st.just(0)),
        st.tuples(st.just("deactivate"), names, st.just(0)),
        st.tuples(st.just("prompt"), names, tokens),
        st.tuples(st.just("output"), names, tokens),
    ),
    max_size=60,
)


@given(events, st.integers(2, 5))
def test_counters_never_fall_while_they_are_remembered_and_memory_is_bounded(made: list[tuple[str, str, int]], max_idle: int) -> None:
    shares = FairShares(WEIGHTS, max_idle=max_idle)
    for event, name, amount in made:
        before = {known: shares.counter(known) for known in NAMES}
        actives = set(shares.active)
        match event:
            case "activate":
                least = min((before[other] for other in actives), default=None)
                shares.activate(name)
                assert name in actives or least is None or shares.counter(name) >= least
            case "deactivate":
                shares.deactivate(name)
            case "prompt":
                shares.charge_prompt(name, amount)
            case _:
                shares.charge_output(name, amount)
        assert shares.remembered <= max_idle
        for known in NAMES:
            assert shares.counter(known) >= before[known] or (event == "deactivate" and shares.counter(known) == 0.0)
        counters = [(shares.counter(tenant), tenant) for tenant in shares.order(NAMES)]
        assert counters == sorted(counters)


@given(st.lists(st.tuples(names, tokens), max_size=30))
def test_a_dispatch_that_failed_before_its_first_token_costs_nothing(failed: list[tuple[str, int]]) -> None:
    shares = FairShares(WEIGHTS)
    for name in NAMES:
        shares.activate(name)
    for name, amount in failed:
        shares.charge_prompt(name, amount)
        shares.refund(name, amount)
    assert all(abs(shares.counter(name)) < 1e-6 for name in NAMES)
