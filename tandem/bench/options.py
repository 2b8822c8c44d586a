"""What a load test is told: its settings, checked, with the option at fault named. Must not read files or call anybody."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.domain import Slo
from tandem.errors import ConfigError
from tandem.workload import FIRST_PROMPT_TOKEN_ID, Lengths

DEFAULT_REQUESTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """All settings of one load test. None where not given.

    `endpoint` names a router by gRPC, `url` an OpenAI server; with neither, the endpoint is found as other commands find it.
    """

    endpoint: str | None = None
    url: str | None = None
    model: str | None = None
    rate_rps: float | None = None  # None: 1, or a trace's own; inf: all at once
    requests: int | None = None
    duration_s: float | None = None
    prompt: str | None = None  # tokens, or LOW:HIGH
    output: str | None = None
    shared_prefix_tokens: int = 0
    vocabulary_tokens: int = 2048  # the bundled model's; larger models have these ids too
    concurrency: int | None = None
    seed: int = 0
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    trace: Path | None = None
    trace_scale: float = 1.0
    warmup: int = 0
    timeout_s: float = 600.0

    def validate(self) -> None:
        """Raises ConfigError naming the first option that is wrong or does not go with another."""
        if self.endpoint is not None and self.url is not None:
            raise ConfigError("--endpoint (gRPC) and --url (HTTP) name two servers: give one")
        for name, value, is_good, words in (
            ("--rate", self.rate_rps, _is_above_0(self.rate_rps, may_be_infinite=True), "above 0 requests a second, or inf"),
            ("--requests", self.requests, _is_above_0(self.requests), "at least 1"),
            ("--duration-s", self.duration_s, _is_above_0(self.duration_s), "a finite number of seconds above 0"),
            ("--concurrency", self.concurrency, _is_above_0(self.concurrency), "at least 1"),
            ("--slo-ttft-s", self.slo_ttft_s, _is_above_0(self.slo_ttft_s), "a finite number of seconds above 0"),
            ("--slo-tpot-s", self.slo_tpot_s, _is_above_0(self.slo_tpot_s), "a finite number of seconds above 0"),
            ("--timeout-s", self.timeout_s, _is_above_0(self.timeout_s), "a finite number of seconds above 0"),
            ("--trace-scale", self.trace_scale, _is_above_0(self.trace_scale), "a finite number above 0"),
            ("--seed", self.seed, self.seed >= 0, "0 or more"),
            ("--warmup", self.warmup, self.warmup >= 0, "0 or more"),
            ("--shared-prefix-tokens", self.shared_prefix_tokens, self.shared_prefix_tokens >= 0, "0 or more"),
            ("--vocabulary-tokens", self.vocabulary_tokens, self.vocabulary_tokens > FIRST_PROMPT_TOKEN_ID, "4 or more"),
        ):
            if not is_good:
                raise ConfigError(f"{name} must be {words}, got {value}")
        if self.trace is None:
            self._validate_synthetic()
        else:
            self._validate_trace()

    def _validate_synthetic(self) -> None:
        if self.trace_scale != 1.0:
            raise ConfigError("--trace-scale needs --trace")
        if self.requests is None and self.rate_rps is not None and math.isinf(self.rate_rps) and self.duration_s is not None:
            raise ConfigError("--rate inf sends all at once and needs --requests, not --duration-s")
        if self.shared_prefix_tokens > self.prompt_lengths.low_tokens:
            raise ConfigError(
                f"--shared-prefix-tokens is a part of the prompt and must be at most the shortest prompt,"
                f" {self.prompt_lengths.low_tokens} tokens, got {self.shared_prefix_tokens}"
            )
        _ = self.output_lengths

    def _validate_trace(self) -> None:
        given = {"--prompt-tokens": self.prompt, "--output-tokens": self.output, "--shared-prefix-tokens": self.shared_prefix_tokens}
        wrong = next((name for name, value in given.items() if value), None)
        if wrong is not None:
            raise ConfigError(f"{wrong} does not go with --trace, which says how long each request is")

    @property
    def prompt_lengths(self) -> Lengths:
        """Of a synthetic workload; raises ConfigError."""
        return Lengths.parse("--prompt-tokens", self.prompt or "256")

    @property
    def output_lengths(self) -> Lengths:
        """Of a synthetic workload; raises ConfigError."""
        return Lengths.parse("--output-tokens", self.output or "64")

    @property
    def slo(self) -> Slo:
        """The objectives."""
        return Slo(ttft_s=self.slo_ttft_s, tpot_s=self.slo_tpot_s)

    @property
    def synthetic_rate_rps(self) -> float:
        """Of a synthetic workload."""
        return 1.0 if self.rate_rps is None else self.rate_rps

    @property
    def synthetic_requests(self) -> int:
        """How many a synthetic workload has: as asked, or as many as the rate gives in the duration; the fewer where both are given."""
        if self.duration_s is None or math.isinf(self.synthetic_rate_rps):
            return self.requests or DEFAULT_REQUESTS
        in_duration = max(1, round(self.synthetic_rate_rps * self.duration_s))
        return in_duration if self.requests is None else min(in_duration, self.requests)

    def described(self) -> dict[str, object]:
        """The settings that shape the workload, for the report; an infinite rate is the arrivals' name, because JSON has no infinity."""
        settings = asdict(self)
        is_burst = self.rate_rps is not None and math.isinf(self.rate_rps)
        rate_rps = self.rate_rps if self.trace is not None else self.synthetic_rate_rps
        return {
            **{name: value for name, value in settings.items() if name not in ("endpoint", "url", "model", "prompt", "output")},
            "rate_rps": None if is_burst else rate_rps,
            "arrivals": "burst" if is_burst else "poisson" if self.trace is None else "trace",
            "prompt_tokens": None if self.trace is not None else asdict(self.prompt_lengths),
            "output_tokens": None if self.trace is not None else asdict(self.output_lengths),
            "trace": None if self.trace is None else self.trace.name,
        }


def _is_above_0(value: float | None, *, may_be_infinite: bool = False) -> bool:
    return value is None or (value > 0 and (math.isfinite(value) or (may_be_infinite and not math.isnan(value))))
