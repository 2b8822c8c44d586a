"""Seconds from tokens: the shape of prefill and decode time, fitted online to what was measured.

Must not know replicas, requests or clocks: features in, seconds out. The simulator's physics share no coefficient with this.
"""

from collections.abc import Sequence

# Measured on 2 CPU cores with the bundled model (reference/vllm.md): 69 ms for 1000 tokens, about 2 ms a decode step.
# Only the first requests see these; a GPU's values are reached within some ten observations.
_PREFILL_PRIOR = (5e-3, 7e-5, 1e-9)
_DECODE_PRIOR = (2e-3, 2e-4, 1e-8)
_FORGETTING = 0.98  # about 50 observations of memory
_PRIOR_WEIGHT = 1e-6  # against squared relative errors: bends nothing that was measured, and decides where nothing was
_SWEEPS = 8
_SHORTEST_S = 1e-5


class LeastSquares:
    """Non-negative least squares on relative errors, with exponential forgetting.

    `prior` holds a positive coefficient per feature (seconds per unit) and serves as the scale too, so that features of any size are
    alike. Solved by coordinate descent on the normal equations from the last solution: exact in the limit, O(sweeps x features^2) an
    observation (Franc, Hlavac, Navara 2005, "Sequential coordinate-wise algorithm for NNLS").
    """

    def __init__(self, prior: Sequence[float], *, forgetting: float = _FORGETTING) -> None:
        self._prior = tuple(prior)
        self._forgetting = forgetting
        size = len(self._prior)
        self._gram = [[0.0] * size for _ in range(size)]
        self._moment = [0.0] * size
        self._scale = [1.0] * size  # of each prior coefficient

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of each feature, all >= 0."""
        return tuple(scale * prior for scale, prior in zip(self._scale, self._prior, strict=True))

    def predict(self, features: Sequence[float]) -> float:
        """Seconds for `features`."""
        return sum(coefficient * feature for coefficient, feature in zip(self.coefficients, features, strict=True))

    def observe(self, features: Sequence[float], measured_s: float) -> None:
        """Learns that `features` took `measured_s` seconds. Times of 0 and below are taken as 10 us."""
        target_s = max(measured_s, _SHORTEST_S)
        row = [prior * feature / target_s for prior, feature in zip(self._prior, features, strict=True)]
        for i, left in enumerate(row):
            self._moment[i] = self._forgetting * self._moment[i] + left
            for j, right in enumerate(row):
                self._gram[i][j] = self._forgetting * self._gram[i][j] + left * right
        for _ in range(_SWEEPS):
            for i, gram in enumerate(self._gram):
                others = sum(gram[j] * scale for j, scale in enumerate(self._scale) if j != i)
                self._scale[i] = max(0.0, (self._moment[i] + _PRIOR_WEIGHT - others) / (gram[i] + _PRIOR_WEIGHT))


class PrefillTime:
    """prefill_s = a + b * tokens + c * tokens * context_tokens."""

    def __init__(self) -> None:
        self._fit = LeastSquares(_PREFILL_PRIOR)

    def predict_s(self, tokens: int, context_tokens: int) -> float:
        """Seconds to compute `tokens` uncached tokens that attend to `context_tokens`."""
        return self._fit.predict((1.0, tokens, tokens * context_tokens))

    def backlog_s(self, tokens: int) -> float:
        """Seconds that `tokens` of others' pending prefill take, their contexts unknown."""
        return self._fit.coefficients[1] * tokens

    def observe(self, tokens: int, context_tokens: int, ahead_tokens: int, measured_s: float) -> None:
        """Learns from one prefill that waited behind `ahead_tokens` and took `measured_s` in all."""
        self._fit.observe((1.0, ahead_tokens + tokens, tokens * context_tokens), measured_s)


class DecodeTime:
    """Seconds of one decode step = a + b * batch + c * kv_tokens."""

    def __init__(self) -> None:
        self._fit = LeastSquares(_DECODE_PRIOR)

    def predict_s(self, batch_requests: int, kv_tokens: int) -> float:
        """Seconds between two tokens of a request in a batch of `batch_requests` holding `kv_tokens` of KV."""
        return self._fit.predict((1.0, batch_requests, kv_tokens))

    def observe(self, batch_requests: int, kv_tokens: int, measured_s: float) -> None:
        """Learns from one request's mean step."""
        self._fit.observe((1.0, batch_requests, kv_tokens), measured_s)
