"""Non-negative least squares, small and online: the solver of the normal equations, and a fit that forgets.

Must not know what the features mean. Coefficients below zero have no meaning for times, so there are none.
"""

from collections.abc import Sequence

_FORGETTING = 0.98  # about 50 observations of memory
_HOLD_FRACTION = 1e-6  # of a feature's own weight: bends nothing that was measured, and decides where nothing was
_LEAST_HOLD = 1e-9
_LEAST_GAIN = 1e-9  # of a coefficient, in units of its prior
_SHORTEST_S = 1e-5


class LeastSquares:
    """Non-negative least squares on relative errors, with exponential forgetting.

    `prior` holds a positive coefficient per feature (seconds per unit) and serves as the scale too, so that features of any size are
    alike. Directions that the remembered observations do not determine stay as they are. O(features^3) an observation.
    """

    def __init__(self, prior: Sequence[float], *, forgetting: float = _FORGETTING) -> None:
        self._prior = tuple(prior)
        self._forgetting = forgetting
        size = len(self._prior)
        self._gram = [[0.0] * size for _ in range(size)]
        self._moment = [0.0] * size
        self._scale = [1.0] * size  # of each prior coefficient
        self._coefficients = self._prior

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of each feature, all >= 0."""
        return self._coefficients

    def predict(self, features: Sequence[float]) -> float:
        """Seconds for `features`."""
        return sum(coefficient * feature for coefficient, feature in zip(self._coefficients, features, strict=True))

    def observe(self, features: Sequence[float], measured_s: float) -> None:
        """Learns that `features` took `measured_s` seconds. Times of 0 and below are taken as 10 us."""
        target_s = max(measured_s, _SHORTEST_S)
        row = [prior * feature / target_s for prior, feature in zip(self._prior, features, strict=True)]
        for i, left in enumerate(row):
            self._moment[i] = self._forgetting * self._moment[i] + left
            for j, right in enumerate(row):
                self._gram[i][j] = self._forgetting * self._gram[i][j] + left * right
        self._scale = solve_non_negative(self._gram, self._moment, self._scale, _HOLD_FRACTION)
        self._coefficients = tuple(scale * prior for scale, prior in zip(self._scale, self._prior, strict=True))


def solve_non_negative(
    gram: Sequence[Sequence[float]], moment: Sequence[float], last: Sequence[float], hold_fraction: float
) -> list[float]:
    """The x >= 0 that minimises x'Gx / 2 - m'x + sum of hold_i (x_i - last_i)^2 / 2, where hold_i = hold_fraction * G_ii.

    The hold (a proximal step, Rockafellar 1976) makes the problem definite: what the data does not determine stays at `last`. Solved by
    exchanging one variable at a time between zero and free until no sign is wrong (Lawson and Hanson 1974, ch. 23); O(n^3) each time.
    """
    size = len(moment)
    matrix = [list(row) for row in gram]
    right = list(moment)
    for i in range(size):
        hold = max(hold_fraction * matrix[i][i], _LEAST_HOLD)
        matrix[i][i] += hold
        right[i] += hold * last[i]
    free = list(range(size))
    solution = [0.0] * size
    rounds, is_done = 3 * size, False
    while rounds and not is_done:
        rounds -= 1
        solution = [0.0] * size
        for i, value in zip(free, _solve(matrix, right, free), strict=True):
            solution[i] = value
        lowest = min(range(size), key=solution.__getitem__)
        if solution[lowest] < 0.0:
            free.remove(lowest)
            continue
        gains = [
            0.0 if i in free else (right[i] - sum(a * x for a, x in zip(matrix[i], solution, strict=True))) / matrix[i][i]
            for i in range(size)
        ]
        best = max(range(size), key=gains.__getitem__)
        is_done = gains[best] <= _LEAST_GAIN
        if not is_done:
            free = sorted((*free, best))
    return [max(0.0, value) for value in solution]


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float], free: Sequence[int]) -> list[float]:
    """Gauss elimination of the free rows and columns; positive definite, so without pivoting."""
    rows = [[*(matrix[i][j] for j in free), right[i]] for i in free]
    size = len(rows)
    for k in range(size):
        pivot = rows[k]
        for i in range(k + 1, size):
            row = rows[i]
            factor = row[k] / pivot[k]
            if factor:
                for j in range(k + 1, size + 1):
                    row[j] -= factor * pivot[j]
    values = [0.0] * size
    for k in range(size - 1, -1, -1):
        row = rows[k]
        values[k] = (row[size] - sum(row[j] * values[j] for j in range(k + 1, size))) / row[k]
    return values
