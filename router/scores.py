"""What predictions were worth: each that led to a decision against what happened, and whether a model's are to be trusted.

Must not predict or decide. Predictions are scored whether they are used or not, so that trust can come back by itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import copysign, log1p
from types import MappingProxyType

from router.interval import PredictionKind
from tandem.errors import ConfigError
from tandem.lru import Lru
from tandem.rolling import RollingMean, RollingQuantile

_FLOORS: Mapping[PredictionKind, float] = MappingProxyType({PredictionKind.OUTPUT_TOKENS: 1.0, PredictionKind.QUEUE: 1e-2})
_FLOOR_S = 1e-3
_MAX_ERROR = 2.0
_EXCUSED_GUESSES = 100  # of outcomes: a pool that never shows what its steps take is distrusted after all
_MAX_LOOSENESS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """What a kind's outcomes must keep to be trusted. The return bounds are narrower: no flapping at an edge.

    The error here is mean(min(2, max(p, a) / min(p, a) - 1)), both no smaller than the floor: half as long is as wrong as twice as long,
    and no single outcome decides. The shift is |mean(log(a / p))|, each within log(3): errors to both sides cost little, for the order of
    candidates is hardly another (simulated: a log-normal error of sigma 0.5, a mean error of 0.57, places better than the fallback), but a
    shift says that the engines have changed.
    """

    max_error: float = 1.0  # which short prompts behind full chunks reach, in steps as long as their objectives, and are still placed well
    max_shift: float = 0.33  # all 1.4 times as long, or 0.7 times
    min_coverage: float = 0.65  # of 50: with a true coverage of 0.9 below it once in millions
    max_coverage: float = 0.98  # a fault only where the quantile is loose as well: exact predictions cover everything
    loose_ratio: float = 3.0  # mean of min(q90 / actual, 10) from which a quantile is loose
    return_error: float = 0.9
    return_shift: float = 0.25
    return_min_coverage: float = 0.8
    return_max_coverage: float = 0.97

    def is_kept(self, error: float, shift: float, coverage: float, looseness: float, *, was_kept: bool) -> bool:
        """Whether figures over a full window are inside."""
        max_error, max_shift, low, high = self.max_error, self.max_shift, self.min_coverage, self.max_coverage
        if not was_kept:
            max_error, max_shift, low, high = self.return_error, self.return_shift, self.return_min_coverage, self.return_max_coverage
        return error <= max_error and abs(shift) <= max_shift and coverage >= low and (coverage <= high or looseness <= self.loose_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """Windows in outcomes, not seconds: few requests make no hasty judgement."""

    window_outcomes: int = 200  # of the exported figures
    leave_outcomes: int = 50  # trust is judged by so many
    return_outcomes: int = 100  # without it a judgement takes so many, all since it was lost
    steady_outcomes: int = 1000  # trust that lasted for fewer takes twice as long to come back each time ...
    max_patience_outcomes: int = 800  # ... up to this: at an edge of the band it changes seldom
    # What the engines take: waits in the router's queue hang on who else comes, and say little of them.
    bands: Mapping[PredictionKind, Band] = field(default_factory=lambda: {PredictionKind.PREFILL: Band()})
    max_models: int = 256

    def validate(self) -> None:
        """Raises ConfigError naming the setting."""
        for name in ("window_outcomes", "leave_outcomes", "return_outcomes", "steady_outcomes", "max_models"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_patience_outcomes < self.return_outcomes:
            raise ConfigError("max_patience_outcomes must be no less than return_outcomes")
        for kind, band in self.bands.items():
            if (
                band.return_error > band.max_error
                or band.return_shift > band.max_shift
                or not band.min_coverage <= band.return_min_coverage <= band.return_max_coverage
            ):
                raise ConfigError(f"the band of {kind} must be narrower for the return than for the leave")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Figures of one kind and model over the last outcomes. p: predicted, a: actual, q: predicted q90, f: floor of the kind.

    mean_relative_error = mean((p - a) / max(a, f))      below 0: predicted too short
    mape                = mean(|p - a| / max(a, f))
    q90_coverage        = mean(a <= q)
    f is 1 ms for seconds, 10 ms for the queue's (which are often 0), 1 for tokens. All follow from a log of (kind, p, q, a).
    """

    kind: PredictionKind
    model: str
    outcomes_total: int
    window_outcomes: int
    mean_relative_error: float
    mape: float
    q90_coverage: float
    predicted_p50: float
    actual_p50: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whether a model's predictions are to be used, since when (None: from the start), and how often that has changed."""

    model: str
    is_trusted: bool
    since_s: float | None
    changes_total: int


class _Window:
    """Rolling figures of one kind and model."""

    __slots__ = ("actual", "covered", "errors", "predicted", "signed", "total")

    def __init__(self, size: int) -> None:
        self.signed = RollingMean(size)
        self.errors = RollingMean(size)
        self.covered = RollingMean(size)
        self.predicted = RollingQuantile(size)
        self.actual = RollingQuantile(size)
        self.total = 0


class _Judgement:
    """The outcomes of one kind since trust changed, the last so many."""

    __slots__ = ("covered", "errors", "looseness", "shifts", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.errors = RollingMean(size)
        self.shifts = RollingMean(size)
        self.covered = RollingMean(size)
        self.looseness = RollingMean(size)


class _Judged:
    """Trust in one model, and what it rests on."""

    __slots__ = ("changes", "is_trusted", "kinds", "outcomes", "patience_outcomes", "since_s")

    def __init__(self, config: ScoreConfig) -> None:
        self.is_trusted = True
        self.since_s: float | None = None
        self.changes = 0
        self.outcomes = 0  # since the last change
        self.patience_outcomes = config.return_outcomes  # without trust before it may come back
        self.kinds = {kind: _Judgement(config.leave_outcomes) for kind in config.bands}

    def change(self, config: ScoreConfig, now_s: float) -> None:
        """Trust is lost or comes back; what is judged next has happened since."""
        self.is_trusted = not self.is_trusted
        self.since_s = now_s
        self.changes += 1
        self.outcomes = 0
        size = config.leave_outcomes if self.is_trusted else config.return_outcomes
        self.kinds = {kind: _Judgement(size) for kind in config.bands}


class Scores:
    """All scores of one router. About 5 us an outcome."""

    def __init__(self, config: ScoreConfig | None = None) -> None:
        self._config = config = config or ScoreConfig()
        self._windows: Lru[tuple[PredictionKind, str], _Window] = Lru(
            config.max_models * len(PredictionKind), lambda: _Window(config.window_outcomes)
        )
        self._models: Lru[str, _Judged] = Lru(config.max_models, lambda: _Judged(config))

    def observe(
        self, kind: PredictionKind, model: str, *, predicted: float, q90: float, actual: float, now_s: float, is_guess: bool = False
    ) -> None:
        """Scores one prediction, used or not. One that was a guess counts in the figures and, unless there are very many, not for trust."""
        floor = _FLOORS.get(kind, _FLOOR_S)
        signed = (predicted - actual) / max(actual, floor)
        is_covered = float(actual <= q90)
        window = self._windows.obtain((kind, model))
        window.signed.add(signed)
        window.errors.add(abs(signed))
        window.covered.add(is_covered)
        window.predicted.add(predicted)
        window.actual.add(actual)
        window.total += 1
        if kind not in self._config.bands:
            return
        judged = self._models.obtain(model)
        if is_guess and window.total <= _EXCUSED_GUESSES:
            return
        low, high = sorted((max(predicted, floor), max(actual, floor)))
        judgement = judged.kinds[kind]
        error = min(_MAX_ERROR, high / low - 1.0)
        judgement.errors.add(error)
        judgement.shifts.add(copysign(log1p(error), actual - predicted))
        judgement.covered.add(is_covered)
        judgement.looseness.add(min(_MAX_LOOSENESS, q90 / max(actual, floor)))
        judged.outcomes += 1
        self._judge(judged, now_s)

    def is_trusted(self, model: str) -> bool:
        """Whether decisions should rest on the model's predictions; a model without outcomes is trusted."""
        judged = self._models.get(model)
        return judged is None or judged.is_trusted

    def trust(self) -> tuple[Trust, ...]:
        """Trust in every model, by name."""
        return tuple(
            Trust(model=model, is_trusted=judged.is_trusted, since_s=judged.since_s, changes_total=judged.changes)
            for model, judged in sorted(self._models.items())
        )

    def scores(self) -> tuple[Score, ...]:
        """Figures of every kind and model with outcomes, by kind and model."""
        return tuple(
            Score(
                kind=kind,
                model=model,
                outcomes_total=window.total,
                window_outcomes=len(window.errors),
                mean_relative_error=window.signed.mean,
                mape=window.errors.mean,
                q90_coverage=window.covered.mean,
                predicted_p50=window.predicted.quantile(0.5),
                actual_p50=window.actual.quantile(0.5),
            )
            for (kind, model), window in sorted(self._windows.items(), key=lambda item: item[0])
        )

    def _judge(self, judged: _Judged, now_s: float) -> None:
        config, in_band = self._config, self._is_in_band(judged)
        if judged.is_trusted and in_band is False:
            is_first = judged.changes == 0 or judged.outcomes >= config.steady_outcomes
            patience = config.return_outcomes if is_first else 2 * judged.patience_outcomes
            judged.patience_outcomes = min(patience, config.max_patience_outcomes)
            judged.change(config, now_s)
        elif not judged.is_trusted and in_band and judged.outcomes >= judged.patience_outcomes:
            judged.change(config, now_s)

    def _is_in_band(self, judged: _Judged) -> bool | None:
        """False: a full window is outside its band. True: all with outcomes are full and inside. None: too few outcomes to say."""
        is_full = any(judgement.errors for judgement in judged.kinds.values())
        for kind, judgement in judged.kinds.items():
            if len(judgement.errors) < judgement.size:
                is_full = is_full and not judgement.errors
                continue
            figures = (judgement.errors.mean, judgement.shifts.mean, judgement.covered.mean, judgement.looseness.mean)
            if not self._config.bands[kind].is_kept(*figures, was_kept=judged.is_trusted):
                return False
        return True if is_full else None
