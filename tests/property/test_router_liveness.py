"""Whatever waits is served: workers that finish what they are given suffice, whatever the order of classes, tenants and objectives."""

import heapq
from dataclasses import dataclass, replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import Dispatch, Instruction
from tandem.domain import Receipt, RequestId, Role, Sampling, Slo
from tests.samples import ENGINE, make_lease, make_request

CONFIGS = (RouterConfig(), RouterConfig(one_worker_max_tokens=0))
FLEETS = (("d0",), ("p0", "d0"), ("p0", "d0", "d1"), ("p0", "p1", "d0", "d1"))
SMALL = replace(ENGINE, kv_blocks=40)  # 1,280 tokens
TICK_S = 0.05
FIRST_TOKEN_S = 0.1


@dataclass(frozen=True)
class Arrival:
    """One request, and for how long it decodes."""

    at_s: float
    prompt_tokens: int
    decode_s: float
    priority: int
    tenant: str
    ttft_s: float | None


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        at_s=st.floats(0.0, 12.0),
        prompt_tokens=st.sampled_from((10, 40, 200, 600, 1000)),
        decode_s=st.sampled_from((0.2, 3.0, 9.0)),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from("ab"),
        ttft_s=st.sampled_from((None, None, 0.5, 4.0)),
    ),
    min_size=1,
    max_size=14,
)


def served(arrivals: list[Arrival], config: RouterConfig, fleet: tuple[str, ...], until_s: float) -> set[RequestId]:
    """Who was served by then."""
    core, done = RouterCore(config, Random(0)), set[RequestId]()
    for name in fleet:
        core.replica_seen(make_lease(name, Role.PREFILL if name.startswith("p") else Role.DECODE, engine=SMALL), 0.0)
    events: list[tuple[float, int, str, RequestId, int]] = []  # when, number, what, of which attempt
    by_id = {RequestId(f"r{number}"): arrival for number, arrival in enumerate(arrivals)}

    def obey(instructions: list[Instruction], now_s: float) -> None:
        for one in instructions:
            assert isinstance(one, Dispatch), one
            decode_s = by_id[one.request_id].decode_s
            for after_s, what in ((FIRST_TOKEN_S, "token"), (FIRST_TOKEN_S + decode_s, "end")):
                heapq.heappush(events, (now_s + after_s, len(events), what, one.request_id, one.attempt))

    for request_id, arrival in by_id.items():
        heapq.heappush(events, (arrival.at_s, len(events), "arrival", request_id, 0))
    now_s = 0.0
    while len(done) < len(arrivals) and now_s < until_s:
        now_s += TICK_S
        while events and events[0][0] <= now_s:
            at_s, _, what, request_id, attempt = heapq.heappop(events)
            if what == "arrival":
                arrival = by_id[request_id]
                request = make_request(
                    request_id,
                    arrival.prompt_tokens,
                    Sampling(max_tokens=4),
                    priority=arrival.priority,
                    tenant=arrival.tenant,
                    slo=Slo(ttft_s=arrival.ttft_s),
                    expected_output_tokens=4,
                )
                obey(core.submit(request, block_hashes=(), deadline_s=None, now_s=at_s), at_s)
            elif what == "token":
                obey(core.tokens(request_id, attempt, 1, at_s), at_s)
            else:
                done.add(request_id)
                obey(core.finished(request_id, attempt, Receipt(request_id=request_id), at_s), at_s)
        obey(core.tick(now_s), now_s)
    return done


@given(arrivals=ARRIVALS, config=st.sampled_from(CONFIGS), fleet=st.sampled_from(FLEETS))
@settings(max_examples=400)
def test_everything_that_waits_is_served(arrivals: list[Arrival], config: RouterConfig, fleet: tuple[str, ...]) -> None:
    one_by_one_s = 12.0 + sum(FIRST_TOKEN_S + arrival.decode_s for arrival in arrivals)
    assert len(served(arrivals, config, fleet, 2.0 * one_by_one_s + 30.0)) == len(arrivals)
