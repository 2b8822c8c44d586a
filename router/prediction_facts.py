"""What predictions are worth as numbers with names and labels, for metrics. Must not score or predict."""

from collections.abc import Iterator
from dataclasses import asdict

from router.predict import LoadPredictor

Fact = tuple[str, tuple[str, ...], float]  # a family of `tandem.telemetry.PredictionCollector`, its labels' values, the value


def prediction_facts(predictor: LoadPredictor) -> Iterator[Fact]:
    """Errors and coverage by kind and model, trust by model, step times by pool; O(kinds x models + replicas)."""
    for score in predictor.scores.scores():
        labels = (str(score.kind), score.model)
        yield "prediction_error_fraction", labels, score.mape
        yield "prediction_bias_fraction", labels, score.mean_relative_error
        yield "prediction_q90_coverage_fraction", labels, score.q90_coverage
        yield "prediction_outcomes", labels, float(score.outcomes_total)
    for trust in predictor.scores.trust():
        yield "predictions_are_trusted", (trust.model,), float(trust.is_trusted)
    for report in predictor.pools.reports():
        pool = (report.pool.model, report.pool.hardware, str(report.pool.role))
        yield "step_time_error_fraction", pool, report.error
        yield "straggler_replicas", pool, float(len(report.stragglers))
        for name, seconds in asdict(report.cost).items():
            yield "step_time_coefficient_seconds", (*pool, name.removesuffix("_s")), seconds
