"""A prediction with its upper quantile, and how far predictions of one kind lie from what happens.

Must not know what is predicted: `predict.py` makes the means, `scores.py` judges them.
"""

from enum import StrEnum
from typing import NamedTuple

from tandem.rolling import RollingQuantile

_WINDOW = 500
_LEAST_OUTCOMES = 20
_FIRST_MULTIPLIER = 1.5
_STEP_SIZE = 0.02
_LEVELS = (0.5, 0.995)


class PredictionKind(StrEnum):
    """What is predicted of a request; a label of metrics."""

    TTFT = "ttft"
    PREFILL = "prefill"
    TPOT = "tpot"
    HANDOFF_GAP = "handoff_gap"
    TRANSFER = "transfer"
    QUEUE = "queue"
    E2E = "e2e"
    OUTPUT_TOKENS = "output_tokens"
    STEP = "step"


class Interval(NamedTuple):
    """Expected seconds, and the seconds that nine in ten stay within.

    `base_s` is the mean without the fixed overhead that was learnt; None where the outcome cannot teach one.
    """

    mean_s: float
    q90_s: float
    base_s: float | None = None


class Calibration:
    """The factor from a mean to its upper quantile, by rolling conformal calibration of the last 500 ratios actual / predicted.

    The level asked of the window is moved by every outcome: up by 0.02 * target for one above its quantile, down by 0.02 * (1 - target)
    for one within (adaptive conformal inference, Gibbs and Candes 2021). So coverage returns to the target after a shift long before the
    window has turned over. `floor` is added to both sides: what is predicted as 0 has a quantile too.
    """

    def __init__(self, *, target: float = 0.9, floor: float = 1e-4) -> None:
        self._ratios = RollingQuantile(_WINDOW)
        self._target = target
        self._level = target
        self._floor = floor
        self._multiplier = _FIRST_MULTIPLIER

    @property
    def outcomes(self) -> int:
        """Ratios in the window."""
        return len(self._ratios)

    @property
    def multiplier(self) -> float:
        """q90 = mean * multiplier, the floor aside."""
        return self._multiplier

    def upper(self, mean: float) -> float:
        """The upper quantile of what has this mean; >= 0 and monotone in it."""
        return max(0.0, (mean + self._floor) * self._multiplier - self._floor)

    def observe(self, mean: float, actual: float) -> None:
        """Learns from one outcome; about 2 us."""
        ratio = (max(0.0, actual) + self._floor) / (max(0.0, mean) + self._floor)
        ready = len(self._ratios) >= _LEAST_OUTCOMES
        if ready:
            low, high = _LEVELS
            step = self._target if ratio > self._multiplier else self._target - 1.0
            self._level = min(max(self._level + _STEP_SIZE * step, low), high)
        self._ratios.add(ratio)
        if len(self._ratios) >= _LEAST_OUTCOMES:
            self._multiplier = self._ratios.quantile(self._level)
