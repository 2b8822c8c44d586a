"""How many output tokens a request will have, by what was seen of its session, its tenant's prompts of that length, its tenant, its model.

Must not know prompts' contents, time or placement. Lengths of requests that were cancelled or failed are not to be learnt.
"""

from dataclasses import dataclass
from typing import NamedTuple

from tandem.errors import ConfigError
from tandem.histogram import Distribution, LogHistogram, mixture, whole_edges
from tandem.lru import Lru
from tandem.rolling import RollingQuantile

_LEAST_SHARE = 0.005  # of the mixture; levels below it are left out, which saves their buckets
_FIRST_HINTS = 20  # outcomes before a client's hints are trusted to be as good as they were
_FIRST_HINT_P90 = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLengthConfig:
    """Bounds and memory of the histograms."""

    max_sessions: int = 4096  # some 1.5 KB each; beyond, the one used longest ago counts as new
    max_bins: int = 2048  # of (model, tenant, prompt length)
    max_tenants: int = 512  # of (model, tenant)
    max_models: int = 256
    buckets: int = 64  # 20 % wide above 10 tokens
    max_output_tokens: int = 131_072  # longer ones count as this
    decay: float = 0.999  # about the last 1,000 requests of a key: some minutes of one tenant's traffic
    shrinkage_requests: float = 8.0  # with so many observations a level counts as much as all above it (algorithms.md, 3a)
    first_guess_tokens: int = 128  # before anything was seen
    coverage_fraction: float = 0.9  # how many outputs are to be no longer than p90

    def validate(self) -> None:
        """Raises ConfigError naming the setting."""
        for name in ("max_sessions", "max_bins", "max_tenants", "max_models", "first_guess_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.buckets < 8 or self.max_output_tokens <= self.first_guess_tokens:
            raise ConfigError("buckets must be at least 8, and max_output_tokens above first_guess_tokens")
        if not (0.0 < self.decay <= 1.0 and 0.0 < self.coverage_fraction < 1.0 and self.shrinkage_requests > 0.0):
            raise ConfigError("decay and coverage_fraction must be fractions, shrinkage_requests above 0")


class LengthKey(NamedTuple):
    """What is known of a request before it runs; an empty session or tenant is none."""

    model: str
    tenant: str
    session_id: str
    prompt_tokens: int


class OutputEstimate(NamedTuple):
    """Output tokens still to come: the mean for sums, p50 for one request, p90 for what must be reserved."""

    mean_tokens: float
    p50_tokens: float
    p90_tokens: float


class OutputLengths:
    """Histograms of output lengths at four levels; each level is shrunk towards the ones above it by n / (n + 8)."""

    def __init__(self, config: OutputLengthConfig | None = None) -> None:
        config = config or OutputLengthConfig()
        self._config = config
        self._edges = whole_edges(config.max_output_tokens, config.buckets)
        self._sessions: Lru[tuple[str, str, str], LogHistogram] = Lru(config.max_sessions, self._histogram)
        self._bins: Lru[tuple[str, str, int], LogHistogram] = Lru(config.max_bins, self._histogram)
        self._tenants: Lru[tuple[str, str], LogHistogram] = Lru(config.max_tenants, self._histogram)
        self._models: Lru[str, LogHistogram] = Lru(config.max_models, self._histogram)
        self._guess = self._histogram()
        self._guess.observe(config.first_guess_tokens)
        self._hint_ratios = RollingQuantile(200)
        self.outcomes = 0  # learnt from so far: until there are more, the same request has the same estimate

    @property
    def keys(self) -> int:
        """Histograms held; bounded by the config."""
        return len(self._sessions) + len(self._bins) + len(self._tenants) + len(self._models)

    def estimate(
        self, key: LengthKey, *, produced_tokens: int = 0, max_tokens: int | None = None, expected_tokens: int | None = None
    ) -> OutputEstimate:
        """Tokens still to come of a request that has produced so many and has not ended. About 20 us.

        `max_tokens` bounds produced and coming ones together. `expected_tokens` is the client's word: it is the answer until the
        request has outlived it, with a p90 by how far such words were exceeded lately.
        """
        room = self._config.max_output_tokens if max_tokens is None else max_tokens
        left = max(0.0, float(room - produced_tokens))
        if expected_tokens is not None and expected_tokens > produced_tokens:
            coming = min(left, float(expected_tokens - produced_tokens))
            p90 = min(left, max(coming, expected_tokens * self._hint_p90() - produced_tokens))
            return OutputEstimate(coming, coming, p90)
        known = self._known(key)
        rest = known.beyond(produced_tokens + 1)
        if rest is None:  # longer than anything seen: about as much again as its bucket is wide
            coming = min(left, max(1.0, produced_tokens * 0.1))
            return OutputEstimate(coming, coming, min(left, 2.0 * coming))
        p50, p90 = rest.quantiles(0.5, self._config.coverage_fraction)
        mean = max(0.0, rest.mean(room) - produced_tokens)
        return OutputEstimate(min(left, mean), min(left, p50 - produced_tokens), min(left, p90 - produced_tokens))

    def observe(self, key: LengthKey, output_tokens: int, *, expected_tokens: int | None = None) -> None:
        """Learns from a request that ended by itself, or at its max_tokens."""
        self.outcomes += 1
        length = max(1, output_tokens)
        if expected_tokens is not None:
            self._hint_ratios.add(length / max(1, expected_tokens))
        if key.session_id:
            self._sessions.obtain((key.model, key.tenant, key.session_id)).observe(length)
        self._bins.obtain((key.model, key.tenant, prompt_bin(key.prompt_tokens))).observe(length)
        self._tenants.obtain((key.model, key.tenant)).observe(length)
        self._models.obtain(key.model).observe(length)

    def _known(self, key: LengthKey) -> Distribution:
        """The mixture of all levels, finest first; each takes its share of what the finer ones leave."""
        levels = (
            self._sessions.get((key.model, key.tenant, key.session_id)) if key.session_id else None,
            self._bins.get((key.model, key.tenant, prompt_bin(key.prompt_tokens))),
            self._tenants.get((key.model, key.tenant)),
            self._models.get(key.model),
        )
        parts: list[tuple[LogHistogram, float]] = []
        left = 1.0
        for histogram in levels:
            if histogram is not None and left >= _LEAST_SHARE:
                share = left * histogram.weight / (histogram.weight + self._config.shrinkage_requests)
                parts.append((histogram, share))
                left -= share
        if left >= _LEAST_SHARE:
            parts.append((self._guess, left))
        return mixture(parts)

    def _hint_p90(self) -> float:
        if len(self._hint_ratios) < _FIRST_HINTS:
            return _FIRST_HINT_P90
        return self._hint_ratios.quantile(self._config.coverage_fraction)

    def _histogram(self) -> LogHistogram:
        return LogHistogram(self._edges, decay=self._config.decay, is_whole=True)


def prompt_bin(prompt_tokens: int) -> int:
    """The half octave of a prompt's length: two bins for each doubling."""
    octave = max(1, prompt_tokens).bit_length()
    return 2 * octave + (prompt_tokens * prompt_tokens >= 1 << (2 * octave - 1))
