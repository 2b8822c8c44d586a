"""Step times of two measured engines, as made-up samples with noise (algorithms.md, 3b): what the step-time model is tested on."""

import math
from collections.abc import Callable
from random import Random

from tandem.step_cost import StepCost
from tandem.step_sample import StepSample

NOISE = 0.03
Seconds = Callable[[int, float, int, int], float]
Load = Callable[[Random], tuple[int, int, int, int]]  # prompt tokens computed, tokens before them, requests that decode, their KV


def h200_s(tokens: int, pairs: float, requests: int, kv_tokens: int) -> float:
    """Llama-3.1-8B-FP8 on an H200."""
    base_s = 16.5e-3 if tokens else 4.716e-3
    return base_s + 15.183e-6 * tokens + 2 * 4.21e-10 * pairs + 36.97e-6 * requests + 2.983e-8 * kv_tokens


def distserve_s(tokens: int, pairs: float, requests: int, kv_tokens: int) -> float:
    """OPT-13B on an A100: the batch has a knee at 95 requests, which no linear model can follow."""
    base_s, request_s, kv_token_s = (19.9e-3, 0.0385e-3, 6.27e-7) if requests < 95 else (7.17e-3, 0.158e-3, 5.8e-7)
    if tokens:
        base_s = 18.1e-3
    return base_s + 0.1019e-3 * tokens + 2 * 7.12e-9 * pairs + request_s * requests + kv_token_s * kv_tokens


def prompts(rng: Random) -> tuple[int, int, int, int]:
    """Chunks of prompts of many lengths, some on cached tokens."""
    cached = rng.choice((0, 0, int(rng.lognormvariate(7, 1))))
    return min(8192, int(rng.lognormvariate(7, 1)) + 16), cached, 0, 0


def any_batch(rng: Random) -> tuple[int, int, int, int]:
    """Decode batches of many sizes and contexts."""
    requests = rng.randint(1, 256)
    return 0, 0, requests, int(requests * rng.uniform(300, 3000))


def batch_of(requests: int, context_tokens: int) -> Load:
    """Decode batches that hardly change."""
    return lambda rng: (0, 0, requests + rng.randint(-2, 2), int(requests * context_tokens * rng.uniform(0.95, 1.05)))


def sample(seconds: Seconds, load: Load, rng: Random, *, slowdown: float = 1.0, noise: float = NOISE) -> StepSample:
    """One step of the engine under the load."""
    tokens, cached, requests, kv_tokens = load(rng)
    pairs = int(tokens * cached + tokens * tokens / 2)
    duration_s = seconds(tokens, pairs, requests, kv_tokens) * slowdown * math.exp(rng.gauss(0.0, noise))
    return StepSample(prefill_tokens=tokens, prefill_pairs=pairs, decode_requests=requests, kv_tokens=kv_tokens, duration_s=duration_s)


def mape(cost: StepCost, bias: float, seconds: Seconds, load: Load, rng: Random, *, slowdown: float = 1.0) -> float:
    """Mean |predicted - true| / true over 300 steps without noise."""
    steps = [sample(seconds, load, rng, slowdown=slowdown, noise=0.0) for _ in range(300)]
    predicted = [bias * cost.step_s(step.prefill_tokens, step.prefill_pairs, step.decode_requests, step.kv_tokens) for step in steps]
    return sum(abs(p - step.duration_s) / step.duration_s for p, step in zip(predicted, steps, strict=True)) / len(steps)
