"""Figures follow from the log of outcomes; trust leaves a model outside its band, and comes back."""

from random import Random

import pytest

from router.interval import PredictionKind
from router.scores import Band, ScoreConfig, Scores
from tandem.errors import ConfigError

PREFILL, TPOT, QUEUE = PredictionKind.PREFILL, PredictionKind.TPOT, PredictionKind.QUEUE


class _Router:
    """Requests whose PREFILL is 1 s on average; `predicted_s` is what the router says, its quantile 1.3 times that."""

    def __init__(self, config: ScoreConfig | None = None) -> None:
        self.scores = Scores(config)
        self.rng = Random(5)
        self.now_s = 0.0
        self.trusted: list[bool] = []

    def run(self, count: int, *, predicted_s: float = 1.0, kind: PredictionKind = PREFILL) -> None:
        for _ in range(count):
            self.now_s += 1.0
            actual = self.rng.lognormvariate(0.0, 0.2)
            self.scores.observe(kind, "m", predicted=predicted_s, q90=1.3 * predicted_s, actual=actual, now_s=self.now_s)
            self.trusted.append(self.scores.is_trusted("m"))


def test_figures_are_recomputed_from_the_log() -> None:
    scores, rng = Scores(), Random(1)
    log = [(rng.uniform(0.1, 2), rng.uniform(0.5, 3), rng.uniform(0.0, 2)) for _ in range(450)]
    for p, q, a in log:
        scores.observe(TPOT, "m", predicted=p, q90=q, actual=a, now_s=0.0)
    (score,) = scores.scores()
    last = log[-200:]
    assert score.mean_relative_error == pytest.approx(sum((p - a) / max(a, 1e-3) for p, _, a in last) / 200)
    assert score.mape == pytest.approx(sum(abs(p - a) / max(a, 1e-3) for p, _, a in last) / 200)
    assert score.q90_coverage == pytest.approx(sum(a <= q for _, q, a in last) / 200)
    predicted, actual = sorted(p for p, _, _ in last), sorted(a for _, _, a in last)
    assert (score.predicted_p50, score.actual_p50) == (predicted[100], actual[100])
    assert (score.outcomes_total, score.window_outcomes, score.kind, score.model) == (450, 200, TPOT, "m")


def test_a_wait_of_nothing_is_no_infinite_error() -> None:
    scores = Scores()
    scores.observe(QUEUE, "m", predicted=0.005, q90=0.01, actual=0.0, now_s=0.0)
    assert scores.scores()[0].mape == pytest.approx(0.5)


def test_kinds_and_models_are_apart_and_in_order() -> None:
    scores = Scores()
    for kind, model in ((PREFILL, "b"), (PREFILL, "a"), (PredictionKind.STEP, "a")):
        scores.observe(kind, model, predicted=1.0, q90=1.0, actual=1.0, now_s=0.0)
    assert [(score.kind.value, score.model) for score in scores.scores()] == [("prefill", "a"), ("prefill", "b"), ("step", "a")]
    assert [trust.model for trust in scores.trust()] == ["a", "b"]


def test_a_model_without_outcomes_is_trusted() -> None:
    assert Scores().is_trusted("m")


def test_good_predictions_stay_trusted() -> None:
    router = _Router()
    router.run(5000)
    assert all(router.trusted)
    (trust,) = router.scores.trust()
    assert (trust.is_trusted, trust.since_s, trust.changes_total) == (True, None, 0)


def test_a_fleet_that_turns_twice_as_slow_loses_trust_within_200_and_regains_it_after_relearning() -> None:
    router = _Router()
    router.run(1000)
    router.run(200, predicted_s=0.5)
    assert not router.trusted[-1]
    router.run(50)
    assert not router.trusted[-1]
    router.run(150)
    assert router.trusted[-1]
    (trust,) = router.scores.trust()
    assert trust.changes_total == 2
    assert trust.since_s is not None
    assert trust.since_s > 1200.0


def test_predictions_far_too_long_lose_trust_too() -> None:
    router = _Router()
    router.run(300, predicted_s=4.0)
    assert not router.trusted[-1]


def test_a_quantile_that_covers_all_is_a_fault_only_where_it_is_loose() -> None:
    config = ScoreConfig(bands={PREFILL: Band(max_error=9.0, return_error=9.0, max_shift=9.0, return_shift=9.0)})
    router = _Router(config)
    router.run(200, predicted_s=1.8)  # its quantile is beyond all, and 2.4 times what happens
    assert router.trusted[-1]
    router.run(200, predicted_s=2.8)
    assert not router.trusted[-1]


def test_few_outcomes_are_no_judgement() -> None:
    router = _Router()
    router.run(49, predicted_s=0.1)
    assert all(router.trusted)
    router.run(1, predicted_s=0.1)
    assert not router.trusted[-1]


def test_at_the_edge_of_the_band_trust_changes_seldom() -> None:
    router = _Router()
    router.run(10_000, predicted_s=0.85)  # covers 69 %
    (trust,) = router.scores.trust()
    assert trust.changes_total <= 30


def test_kinds_without_a_band_do_not_count() -> None:
    router = _Router()
    router.run(500, predicted_s=0.1, kind=TPOT)
    assert router.trusted[-1]


def test_every_band_must_be_kept() -> None:
    router = _Router(ScoreConfig(bands={PREFILL: Band(), TPOT: Band()}))
    router.run(200)
    router.run(120, predicted_s=0.2, kind=TPOT)
    assert not router.trusted[-1]
    router.run(50, kind=TPOT)
    router.run(150)
    assert not router.trusted[-1]  # tpot has not had its hundred
    router.run(150, kind=TPOT)
    assert router.trusted[-1]


def test_a_band_without_outcomes_does_not_keep_trust_away() -> None:
    router = _Router(ScoreConfig(bands={PREFILL: Band(), TPOT: Band()}))
    router.run(150, predicted_s=0.2)
    assert not router.trusted[-1]
    router.run(250)
    assert router.trusted[-1]


@pytest.mark.parametrize(
    "wrong",
    [
        ScoreConfig(leave_outcomes=0),
        ScoreConfig(max_patience_outcomes=50),
        ScoreConfig(bands={PREFILL: Band(return_error=1.1)}),
        ScoreConfig(bands={PREFILL: Band(return_shift=0.5)}),
        ScoreConfig(bands={PREFILL: Band(return_min_coverage=0.5)}),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: ScoreConfig) -> None:
    with pytest.raises(ConfigError):
        wrong.validate()


def test_the_defaults_are_valid() -> None:
    ScoreConfig().validate()


@pytest.mark.parametrize(("factors", "is_trusted"), [((1.0, 1.9, 1 / 1.9), True), ((1.6, 1.5, 1.4), False), ((0.6, 0.65, 0.7), False)])
def test_errors_to_both_sides_are_borne_and_a_shift_of_all_is_not(factors: tuple[float, ...], is_trusted: bool) -> None:
    scores = Scores()
    for number in range(60):
        actual = factors[number % len(factors)]
        scores.observe(PREFILL, "m", predicted=1.0, q90=2.0, actual=actual, now_s=float(number))
    assert scores.is_trusted("m") is is_trusted


def test_the_first_guesses_cost_no_trust_and_endless_ones_do() -> None:
    scores = Scores()
    for number in range(100):
        scores.observe(PREFILL, "m", predicted=0.1, q90=0.2, actual=9.0, now_s=float(number), is_guess=True)
    assert scores.scores()[0].outcomes_total == 100
    assert scores.is_trusted("m")
    for number in range(100, 150):
        scores.observe(PREFILL, "m", predicted=0.1, q90=0.2, actual=9.0, now_s=float(number), is_guess=True)
    assert not scores.is_trusted("m")
