"""Two backlogged tenants by their weights, and one at its quota, over two routers."""

import asyncio
import time
from random import Random

from tandem.client import AsyncClient
from tandem.trials.fleet import Fleet, simulated_fleet
from tandem.trials.sending import Outcome, fresh_prompt, keep_busy, poisson, send

TENANTS = """
[tenants.one]
keys = ["sk-one"]
weight = 1.0
[tenants.three]
keys = ["sk-three"]
weight = 3.0
[tenants.limited]
keys = ["sk-limited"]
prompt_tokens_per_minute = 60000
"""
QUOTA_TOKENS_PER_S = 1000.0
_PROMPT_TOKENS = (400, 1000)
_OUTPUT_TOKENS = 4
_WARM_S, _COUNTED_S = 30.0, 60.0
_LEARNING_S = 20.0  # routers that know no step times send too much ahead, and what a tenant gains by that is then taken back from it
_QUOTA_S = 180.0
_OUTPUT_COST = 2.0
_EVENLY = {"one": (0.5, 0.5), "three": (0.5, 0.5)}  # shares of their requests by router


async def tenant_trials() -> dict[str, object]:
    """Shares with both tenants at both routers, shares with each at a router of its own, quota."""
    async with simulated_fleet(TENANTS) as fleet:
        await shares(fleet, _EVENLY, in_flight=16, warm_s=0.0, counted_s=_LEARNING_S)
        report: dict[str, object] = {"fair_shares": await shares(fleet, _EVENLY)}
        report["fair_shares_mixed_unevenly"] = await shares(fleet, {"one": (0.8, 0.2), "three": (0.4, 0.6)})
        report["fair_shares_apart"] = await shares(fleet, {"one": (1.0, 0.0), "three": (0.0, 1.0)})
        report["quota"] = await quota(fleet)
    return report


async def shares(
    fleet: Fleet, split: dict[str, tuple[float, float]], *, in_flight: int = 160, warm_s: float = _WARM_S, counted_s: float = _COUNTED_S
) -> dict[str, object]:
    """Work that each tenant was served while both had a backlog; `split`: their requests by router."""
    rng = Random(str(split) + str(in_flight))  # no prompt of another trial is cached

    async def load(tenant: str, router: str, count: int) -> list[Outcome]:
        async with AsyncClient(router, api_key=f"sk-{tenant}", timeout_s=None) as client:
            return await keep_busy(
                lambda: asyncio.create_task(
                    send(client, fresh_prompt(rng, rng.randint(*_PROMPT_TOKENS)), max_tokens=_OUTPUT_TOKENS, ignore_eos=True)
                ),
                count,
                warm_s + counted_s,
            )

    loads = [
        (tenant, router, round(part * in_flight))
        for tenant, parts in split.items()
        for router, part in zip(fleet.routers, parts, strict=True)
    ]
    loads = [one for one in loads if one[2]]
    counted_from_s = time.monotonic() + warm_s
    results = await asyncio.gather(*(load(*one) for one in loads))
    served = dict.fromkeys(split, 0.0)
    errors = 0
    for (tenant, _, _), outcomes in zip(loads, results, strict=True):
        errors += sum(bool(outcome.error) for outcome in outcomes)
        served[tenant] += sum(
            outcome.prompt_tokens + _OUTPUT_COST * outcome.output_tokens
            for outcome in outcomes
            if not outcome.error and outcome.first_s is not None and outcome.first_s >= counted_from_s
        )
    return {
        "weights": [1, 3],
        "served_weighted_tokens": [round(served["one"]), round(served["three"])],
        "ratio": served["three"] / served["one"],
        "of_weights": served["three"] / served["one"] / 3.0,
        "seconds": counted_s,
        "errors": errors,
    }


async def quota(fleet: Fleet) -> dict[str, object]:
    """Prompt tokens that were admitted of three times the limit, most of them at one router."""
    rng = Random(2)
    mean_tokens = sum(_PROMPT_TOKENS) / 2
    rate_rps = 3.0 * QUOTA_TOKENS_PER_S / mean_tokens

    async def load(router: str, rate: float) -> list[Outcome]:
        async with AsyncClient(router, api_key="sk-limited", timeout_s=60.0) as client:
            return await poisson(
                lambda: asyncio.create_task(send(client, fresh_prompt(rng, rng.randint(*_PROMPT_TOKENS)), max_tokens=1)),
                rate,
                _QUOTA_S,
                rng,
            )

    began_s = time.monotonic()
    results = await asyncio.gather(load(fleet.routers[0], 0.7 * rate_rps), load(fleet.routers[1], 0.3 * rate_rps))
    admitted = [(outcome.sent_s - began_s, outcome.prompt_tokens) for outcomes in results for outcome in outcomes if not outcome.error]
    all_sent = sum(outcome.prompt_tokens for outcomes in results for outcome in outcomes)
    whole = sum(tokens for _, tokens in admitted)
    return {
        "limit_tokens_per_s": QUOTA_TOKENS_PER_S,
        "offered_of_limit": all_sent / (_QUOTA_S * QUOTA_TOKENS_PER_S),
        "seconds": _QUOTA_S,
        "admitted_of_limit": whole / (_QUOTA_S * QUOTA_TOKENS_PER_S),
        "admitted_of_limit_after_30_s": sum(tokens for at_s, tokens in admitted if at_s >= 30.0) / ((_QUOTA_S - 30.0) * QUOTA_TOKENS_PER_S),
    }
