"""The requests of the load: lengths, options, who sends them and how, as a function of the seed. Must not hold prompts or send anything.

A *case* is what is asked; a *send* is one request of it. Cases come again, so that what the store holds is used.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

PROMPT_TOKENS = (5, 1500)
OUTPUT_TOKENS = (16, 200)
# Frequent enough in the bundled model's field that most of these requests end by them.
_STOPS = ("\n\n", ". ", " the ")
_STOP_SHARE, _LOGPROBS_SHARE = 0.15, 0.15
_CANCEL_SHARE, _HTTP_SHARE = 0.08, 0.2


class Transport(StrEnum):
    """How a request travels. Of the SDK's endpoint list, `PROXIED` reaches its first router through the harness' proxy."""

    SDK = "sdk"
    PROXIED = "proxied"
    HTTP = "http"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is asked, greedily: `prompt_tokens` of the source text from `offset` (a fraction of it) on."""

    number: int
    offset: float
    prompt_tokens: int
    max_tokens: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """One request, `gap_s` after the one before. The client goes away after `cancel_after_tokens`, where that is given."""

    index: int
    case: int
    gap_s: float
    transport: Transport
    first_router: float  # 0 to below 1
    cancel_after_tokens: int | None = None


def plan_cases(count: int, seed: int) -> tuple[Case, ...]:
    """Prompt lengths evenly by their logarithm, both ends among them where there are two cases."""
    rng, low, high = Random(f"cases {seed}"), *map(math.log, PROMPT_TOKENS)
    cases = []
    for number in range(count):
        length = PROMPT_TOKENS[number] if number < len(PROMPT_TOKENS) else round(math.exp(rng.uniform(low, high)))
        draw = rng.random()
        case = Case(
            number=number,
            offset=rng.random(),
            prompt_tokens=length,
            max_tokens=rng.randint(*OUTPUT_TOKENS),
            stop=(rng.choice(_STOPS),) if draw < _STOP_SHARE else (),
            logprobs=2 if _STOP_SHARE <= draw < _STOP_SHARE + _LOGPROBS_SHARE else None,
        )
        cases.append(case)
    return tuple(cases)


def endless_sends(cases: Sequence[Case], seed: int, rate_rps: float) -> Iterator[Send]:
    """All cases in one order after the other, for ever, with exponential gaps."""
    rng, index = Random(f"sends {seed}"), 0
    while True:
        for case in rng.sample(cases, len(cases)):
            draw = rng.random()
            transport = Transport.HTTP if draw < _HTTP_SHARE else Transport.SDK if draw < (1.0 + _HTTP_SHARE) / 2 else Transport.PROXIED
            yield Send(
                index=index,
                case=case.number,
                gap_s=rng.expovariate(rate_rps),
                transport=transport,
                first_router=rng.random(),
                cancel_after_tokens=rng.randint(1, case.max_tokens // 2) if rng.random() < _CANCEL_SHARE else None,
            )
            index += 1
