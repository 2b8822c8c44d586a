"""What the router's predictions are worth on real engines: coverage, step times, and the exported error against the receipts' own."""

import asyncio
import math
import statistics
from collections.abc import Sequence
from random import Random

from tandem.client import AsyncClient
from tandem.trials.fleet import Fleet, fleet
from tandem.trials.sending import Outcome, fresh_prompt, poisson, send

_OPTIONS = ("--kv-cache-bytes=134217728", "--dtype=float32")
_PROMPT_TOKENS, _OUTPUT_TOKENS = (16, 1500), (4, 48)
_REPEATED, _SHARED = 0.3, 0.5  # share of prompts that were sent before; of those, how much at least is kept
_WINDOW_OUTCOMES = 200  # of the exported figures
_FLOOR_S = 1e-3


async def prediction_trials(requests: int, warmup: int, rate_rps: float) -> dict[str, object]:
    """One prefill and one decode replica of the bundled model, Poisson arrivals, prompts of all lengths, some of them known."""
    async with fleet(1, 1, 1, _OPTIONS) as running:
        return await _predict(running, requests, warmup, rate_rps)


async def _predict(running: Fleet, requests: int, warmup: int, rate_rps: float) -> dict[str, object]:
    rng, sent = Random(6), list[list[int]]()
    low, high = map(math.log, _PROMPT_TOKENS)

    def prompt() -> list[int]:
        tokens = round(math.exp(rng.uniform(low, high)))
        if sent and rng.random() < _REPEATED:
            known = rng.choice(sent[-200:])
            kept = known[: round(len(known) * rng.uniform(_SHARED, 1.0))]
            return kept + fresh_prompt(rng, max(1, tokens - len(kept)))
        sent.append(fresh_prompt(rng, tokens))
        return sent[-1]

    async with AsyncClient(running.routers[0], timeout_s=120.0) as client:

        def make() -> "asyncio.Task[Outcome]":
            return asyncio.create_task(send(client, prompt(), max_tokens=rng.randint(*_OUTPUT_TOKENS), ignore_eos=True, temperature=0.0))

        await poisson(make, rate_rps, warmup / rate_rps, rng)
        outcomes = await poisson(make, rate_rps, requests / rate_rps, rng)
    scored = sorted((outcome for outcome in outcomes if outcome.receipt is not None), key=lambda outcome: outcome.ended_s)
    judged, window = judge_ttft(scored), judge_ttft(scored[-_WINDOW_OUTCOMES:])
    exported = await running.total("tandem_router_prediction_error_fraction", 'kind="ttft"')
    exported_coverage = await running.total("tandem_router_prediction_q90_coverage_fraction", 'kind="ttft"')
    return {
        "requests": len(outcomes),
        "warmup": warmup,
        "rate_rps": rate_rps,
        "errors": sum(bool(outcome.error) for outcome in outcomes),
        "handed_off": sum(outcome.receipt.handed_off for outcome in scored if outcome.receipt is not None),
        **judged,
        "exported_ttft_error": exported,
        "recomputed_ttft_error": window["ttft_error"],
        "exported_ttft_q90_coverage": exported_coverage,
        "recomputed_ttft_q90_coverage": window["ttft_q90_coverage"],
        "step_time_error": {
            role: await running.total("tandem_router_step_time_error_fraction", f'role="{role}"') for role in ("prefill", "decode")
        },
        "step_time_coefficients_s": {
            f"{role} {name}": await running.total("tandem_router_step_time_coefficient_seconds", f'role="{role}"', f'unit="{name}"')
            for role in ("prefill", "decode")
            for name in ("base", "token", "pair", "request", "kv_token")
        },
    }


def judge_ttft(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean error and coverage of the predicted TTFT, as `router.scores.Score` has them."""
    errors, covered = list[float](), list[bool]()
    for outcome in outcomes:
        assert outcome.receipt is not None
        by_name = {term.name: term for term in outcome.receipt.predicted}
        actual = by_name["ttft_s"].actual
        assert actual is not None
        errors.append(abs(by_name["ttft_s"].predicted - actual) / max(actual, _FLOOR_S))
        covered.append(actual <= by_name["ttft_q90_s"].predicted)
    return {"ttft_error": statistics.fmean(errors), "ttft_q90_coverage": statistics.fmean(covered)}
