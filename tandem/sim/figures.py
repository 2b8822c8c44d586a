"""The figures of simulated runs: of one run, and means with confidence intervals over seeds. Must not simulate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import sqrt

import numpy as np

from tandem.sim.cluster import Outcome
from tandem.sim.engine_profile import EngineProfile
from tandem.sim.objective import Objective

# Two-sided 95 % of Student's t by degrees of freedom; beyond 30 the normal one.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09)
_T95_MORE = (2.05, 1.96)
_MANY = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one run. `hit_fraction`: prompt tokens that were not computed / prompt tokens. Mean TPOT is of requests."""

    ttft_mean_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    slo_attainment: float
    goodput_rps: float
    hit_fraction: float


def figures_of(outcomes: Sequence[Outcome], profile: EngineProfile, objective: Objective) -> Figures:
    """Requests that never had a first token count against the objective and the goodput, and have no times."""
    ttfts_s = [outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]
    tpots_s = [outcome.tpot_s for outcome in outcomes if outcome.tpot_s is not None]
    good = sum(is_met(outcome, profile, objective) for outcome in outcomes)
    duration_s = max((outcome.end_s for outcome in outcomes if outcome.end_s is not None), default=0.0)
    prompt_tokens = sum(outcome.arrival.prompt_tokens for outcome in outcomes)
    return Figures(
        ttft_mean_s=float(np.mean(ttfts_s)) if ttfts_s else 0.0,
        ttft_p99_s=float(np.percentile(ttfts_s, 99)) if ttfts_s else 0.0,
        tpot_mean_s=float(np.mean(tpots_s)) if tpots_s else 0.0,
        slo_attainment=good / len(outcomes),
        goodput_rps=good / duration_s if duration_s else 0.0,
        hit_fraction=sum(outcome.cached_tokens for outcome in outcomes) / prompt_tokens,
    )


def is_met(outcome: Outcome, profile: EngineProfile, objective: Objective) -> bool:
    """Whether the request ended within both; one of a single token has no TPOT and meets any."""
    if outcome.ttft_s is None or outcome.end_s is None:
        return False
    is_in_time = outcome.ttft_s <= objective.ttft_s(outcome.arrival.prompt_tokens, profile)
    return is_in_time and (outcome.tpot_s is None or outcome.tpot_s <= objective.tpot_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds and its 95 % confidence interval (Student's t); of one seed there is none."""

    mean: float
    low: float | None
    high: float | None


def interval(values: Iterable[float]) -> Interval:
    """Of at least one value, one a seed."""
    given = list(values)
    mean = sum(given) / len(given)
    if len(given) < 2:
        return Interval(mean=mean, low=None, high=None)
    deviation = sqrt(sum((value - mean) ** 2 for value in given) / (len(given) - 1))
    half = _student(len(given) - 1) * deviation / sqrt(len(given))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def intervals(runs: Sequence[Figures]) -> Mapping[str, Interval]:
    """Of every figure, by its name."""
    return {field.name: interval(getattr(run, field.name) for run in runs) for field in fields(Figures)}


def _student(freedom: int) -> float:
    return _T95[freedom - 1] if freedom <= len(_T95) else _T95_MORE[freedom > _MANY]
