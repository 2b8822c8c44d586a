"""More than the fleet can do, in simulated time: most of what it can do is still done in time, whether predictions are trusted or not."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import Instruction
from router.predict import LoadPredictor
from router.scores import Scores
from tandem.domain import BlockHash, Request, Slo
from tandem.sim.arrivals import Arrival
from tandem.sim.cluster import Cluster, ClusterPlan
from tandem.sim.engine_profile import EngineProfile

# 700 tokens take 0.7 s, so four prefill workers do 5.5 requests a second.
PROFILE = EngineProfile(
    name="slow",
    prefill_base_s=0.02,
    prefill_token_s=1e-3,
    prefill_pair_s=0.0,
    decode_base_s=0.02,
    decode_request_s=1e-4,
    decode_kv_token_s=0.0,
    kv_room_tokens=200_000,
    kv_bytes_per_token=1000,
    max_num_batched_tokens=512,
)
PLAN = ClusterPlan(profile=PROFILE, prefill_replicas=4, decode_replicas=4, local_tokens=1, store_tokens=None)
FULL_RPS, OVERLOAD_RPS = 5.5, 16.5
TTFT_S, TIMEOUT_S = 3.0, 6.0
OVER_S = 60.0


class Distrusted(Scores):
    """Trusts nothing."""

    def is_trusted(self, model: str) -> bool:
        return False


class Impatient(RouterCore):
    """Every request has an objective and a deadline, and half of them may be shed."""

    def submit(
        self, request: Request, *, block_hashes: Sequence[BlockHash], deadline_s: float | None, now_s: float, is_begun: bool = False
    ) -> list[Instruction]:
        request = replace(request, slo=Slo(ttft_s=TTFT_S), sheddable=int(request.request_id) % 2 == 0)
        return super().submit(request, block_hashes=block_hashes, deadline_s=now_s + TIMEOUT_S, now_s=now_s, is_begun=is_begun)


def arrivals() -> list[Arrival]:
    """A minute of half the load to learn from, then one of three times what the fleet can do."""
    rng, found, time_s = Random(1), list[Arrival](), 0.0
    while time_s < 2 * OVER_S:
        time_s += rng.expovariate(FULL_RPS / 2 if time_s < OVER_S else OVERLOAD_RPS)
        tokens = rng.randint(400, 1000)
        found.append(Arrival(number=len(found), time_s=time_s, prompt_tokens=tokens, output_tokens=4, block_hashes=(), session=""))
    return found


@pytest.mark.parametrize("scores", [Scores, Distrusted], ids=["trusted", "not trusted"])
def test_three_times_the_load_leaves_most_of_what_the_fleet_can_do_in_time(scores: type[Scores]) -> None:
    bound = 10**6
    config = RouterConfig(max_running_requests=bound, max_queued_requests=bound)
    core = Impatient(config, Random(1), predictor=LoadPredictor(scores=scores()))
    cluster = Cluster(PLAN, core, arrivals(), seed=1)
    cluster.run()
    ttfts_s = [outcome.ttft_s for outcome in cluster.outcomes.values() if outcome.arrival.time_s > OVER_S]
    in_time = sum(ttft_s is not None and ttft_s <= TTFT_S for ttft_s in ttfts_s)
    assert in_time > 0.75 * FULL_RPS * OVER_S
