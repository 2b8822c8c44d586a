"""More than the fleet can do: goodput, requests whose time is over, and when a refused caller is told to come back."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from tandem.client import AsyncClient
from tandem.domain import Slo
from tandem.trials.fleet import Fleet, simulated_fleet
from tandem.trials.sending import Outcome, fresh_prompt, poisson, send

_PROMPT_TOKENS = (400, 1000)
_SLO_TTFT_S = 3.0
_TIMEOUT_S = 6.0
_STEP_S = 40.0
_OUTPUT_TOKENS = 4
_EXPIRED = 1000
_RATES = (10.0, 15.0, 20.0, 27.0, 36.0, 48.0, 60.0)  # with the overload eight steps
_GROWTH_FRACTION = 0.02  # less is no growth
_OVERLOAD = 3.0
_BURSTS, _PROBE_EVERY_S = 6, 0.1

Step = dict[str, float]
"""What became of the load at one rate: `rate_rps`, `goodput_rps` and counts."""


async def overload_trials() -> dict[str, object]:
    """Goodput at rising rates and at three times what the fleet can do, expired requests, RetryInfo."""
    async with simulated_fleet() as fleet:
        report: dict[str, object] = {"expired": await expired(fleet)}
        report["retry_info"] = await retry_info(fleet)
        report["goodput"] = await goodput(fleet)
    return report


async def goodput(fleet: Fleet) -> dict[str, object]:
    """Requests a second whose first token came within the objective, from rates below the fleet's limit to three times that limit."""
    rng = Random(3)

    async def offer(rate_rps: float) -> Step:
        return await _offer(fleet, rate_rps, rng)

    steps = await climb(offer)
    peak_rps, full_rps = peak(steps)
    over = await offer(_OVERLOAD * full_rps)
    return {
        "steps": steps,
        "peak_rps": peak_rps,
        "full_rps": full_rps,
        "overload": over,
        "of_peak": over["goodput_rps"] / peak_rps,
        "slo_ttft_s": _SLO_TTFT_S,
    }


async def climb(offer: Callable[[float], Awaitable[Step]], rates_rps: Sequence[float] = _RATES) -> list[Step]:
    """Offers rising rates until goodput has twice in turn not grown by 2 % of the best, or all are offered: one dip is no peak."""
    steps, best_rps, flat = list[Step](), 0.0, 0
    for rate_rps in rates_rps:
        step = await offer(rate_rps)
        steps.append(step)
        goodput_rps = step["goodput_rps"]
        flat = 0 if goodput_rps > (1 + _GROWTH_FRACTION) * best_rps else flat + 1
        if flat == 2:
            break
        best_rps = max(best_rps, goodput_rps)
    return steps


def peak(steps: Sequence[Step]) -> tuple[float, float]:
    """The best goodput, and the least rate that reaches it within 2 %: beyond, more load is overload. Both requests a second."""
    best_rps = max(step["goodput_rps"] for step in steps)
    return best_rps, min(step["rate_rps"] for step in steps if step["goodput_rps"] >= (1 - _GROWTH_FRACTION) * best_rps)


async def _offer(fleet: Fleet, rate_rps: float, rng: Random) -> Step:
    """Half of the requests may be shed; all have an objective and a deadline."""

    async def load(router: str) -> list[Outcome]:
        async with AsyncClient(router, timeout_s=_TIMEOUT_S) as client:
            return await poisson(
                lambda: asyncio.create_task(
                    send(
                        client,
                        fresh_prompt(rng, rng.randint(*_PROMPT_TOKENS)),
                        max_tokens=_OUTPUT_TOKENS,
                        slo=Slo(ttft_s=_SLO_TTFT_S),
                        sheddable=rng.random() < 0.5,
                    )
                ),
                rate_rps / len(fleet.routers),
                _STEP_S,
                rng,
            )

    began_s = time.monotonic()
    outcomes = [outcome for some in await asyncio.gather(*map(load, fleet.routers)) for outcome in some]
    took_s = max(_STEP_S, max(outcome.ended_s for outcome in outcomes) - began_s)
    good = [one for one in outcomes if not one.error and one.first_s is not None and one.first_s - one.sent_s <= _SLO_TTFT_S]
    served = [one for one in outcomes if not one.error]
    return {
        "rate_rps": rate_rps,
        "sent": len(outcomes),
        "served": len(served),
        "goodput_rps": len(good) / took_s,
        "seconds": took_s,
        **{
            f"errors_{reason}": sum(one.error == reason for one in outcomes)
            for reason in sorted({one.error for one in outcomes if one.error})
        },
    }


async def expired(fleet: Fleet) -> dict[str, object]:
    """A thousand requests whose time is over before a worker could begin, behind a backlog that lasts longer than they do."""
    rng = Random(4)
    async with AsyncClient(",".join(fleet.routers), timeout_s=120.0) as client, asyncio.TaskGroup() as group:
        before = await fleet.total("tandem_worker_accepted_prefill_tokens_total")
        backlog = [group.create_task(send(client, fresh_prompt(rng, 1000), max_tokens=1)) for _ in range(64)]
        await asyncio.sleep(1.0)
        late = await asyncio.gather(*(send(client, fresh_prompt(rng, 1000), max_tokens=1, timeout_s=0.05) for _ in range(_EXPIRED)))
        done = [await task for task in backlog]
        await asyncio.sleep(1.0)
        tokens = await fleet.total("tandem_worker_accepted_prefill_tokens_total") - before
    return {
        "requests": len(late),
        "errors": {reason: sum(one.error == reason for one in late) for reason in sorted({one.error for one in late})},
        "backlog_errors": sum(bool(one.error) for one in done),
        "prefill_tokens_of_the_backlog": sum(one.prompt_tokens for one in done),
        "prefill_tokens_in_all": tokens,
        "prefill_tokens_of_the_expired": tokens - sum(one.prompt_tokens for one in done),
    }


async def retry_info(fleet: Fleet) -> dict[str, object]:
    """After a burst, a sheddable request is refused with a time to come back: against the time after which it is really taken."""
    ratios = list[float]()
    rng = Random(5)
    for number in range(_BURSTS):
        async with AsyncClient(fleet.routers[number % 2], timeout_s=120.0) as client, asyncio.TaskGroup() as group:
            burst = rng.randrange(80, 240)
            running = [group.create_task(send(client, fresh_prompt(rng, rng.randint(*_PROMPT_TOKENS)), max_tokens=1)) for _ in range(burst)]
            await asyncio.sleep(0.5)
            refused = list[tuple[float, float]]()
            while True:
                probe = await send(client, fresh_prompt(rng, 700), max_tokens=1, sheddable=True, slo=Slo(ttft_s=1.5))
                if probe.retry_after_s is None:
                    break
                refused.append((probe.sent_s, probe.retry_after_s))
                await asyncio.sleep(_PROBE_EVERY_S)
            ratios += [told_s / (probe.sent_s - sent_s) for sent_s, told_s in refused[:: max(1, len(refused) // 10)]]
            for task in running:
                await task
    return {
        "refusals": len(ratios),
        "told_of_true_p50": statistics.median(ratios) if ratios else None,
        "told_of_true_p10": statistics.quantiles(ratios, n=10)[0] if len(ratios) > 1 else None,
        "told_of_true_p90": statistics.quantiles(ratios, n=10)[-1] if len(ratios) > 1 else None,
    }
