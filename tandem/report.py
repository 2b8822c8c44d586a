"""The figures of a load test, from what the client saw of each request. Must not measure: times come in.

Definitions are those of `vllm bench serve`, so that medians agree: a *token message* is a message of the stream that carries output.
TTFT: send to the first token message. ITL: gap between successive token messages, one gap a message however many tokens it has.
E2E: send to the last token message. TPOT: (E2E - TTFT) / (output tokens - 1), undefined for one token, which meets any TPOT objective.
Only completed requests count; rates are over the whole run, from the first scheduled moment to the last answer.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from tandem.domain import Slo

# Lag below this is a timer's own grain; above this fraction of a figure it spoils the figure.
_LAG_FLOOR_S = 0.002
_LAG_FRACTION = 0.1
_MAX_EXAMPLE_CHARS = 300


class Outcome(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What the client sees of one request, filled while it runs. Times in seconds of one clock, None until they come."""

    scheduled_s: float
    prompt_tokens: int
    asked_tokens: int
    turn_s: float | None = None  # the generator's hand reached it; before any wait for a free place
    sent_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    output_tokens: int = 0
    is_counted_by_message: bool = False
    outcome: Outcome | None = None
    reason: str = ""
    message: str = ""

    def take_tokens(self, now_s: float, tokens: int) -> None:
        """One token message that came at `now_s`."""
        if self.last_token_s is None:
            self.first_token_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_token_s)
        self.last_token_s = now_s
        self.output_tokens += tokens

    def fail(self, reason: str, message: str) -> None:
        """It failed: `reason` is of low cardinality, `message` for people."""
        self.outcome, self.reason, self.message = Outcome.FAILED, reason, message

    def end(self) -> None:
        """The stream ended well, or `fail` said otherwise."""
        if self.outcome is None and self.first_token_s is None:
            self.fail("no_tokens", "the stream ended without any output")
        elif self.outcome is None:
            self.outcome = Outcome.COMPLETED

    @property
    def ttft_s(self) -> float | None:
        """Send to first token message."""
        return None if self.first_token_s is None or self.sent_s is None else self.first_token_s - self.sent_s

    @property
    def e2e_s(self) -> float | None:
        """Send to last token message."""
        return None if self.last_token_s is None or self.sent_s is None else self.last_token_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None for fewer than two."""
        if self.e2e_s is None or self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    def meets(self, slo: Slo) -> bool:
        """Whether it completed within every objective given."""
        if self.outcome is not Outcome.COMPLETED:
            return False
        pairs = ((self.ttft_s, slo.ttft_s), (self.tpot_s, slo.tpot_s))
        return all(value is None or limit is None or value <= limit for value, limit in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a quantity spreads, in its own unit; percentiles with linear interpolation. All None where `count` is 0."""

    count: int = 0
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    min: float | None = None
    max: float | None = None


def spread(values: Iterable[float | None]) -> Spread:
    """The spread of the values that are defined. O(n log n)."""
    defined = np.fromiter((value for value in values if value is not None), dtype=np.float64)
    if not defined.size:
        return Spread()
    p50, p90, p99 = (float(value) for value in np.percentile(defined, (50, 90, 99)))
    ends = float(defined.min()), float(defined.max())
    return Spread(count=defined.size, mean=float(defined.mean()), p50=p50, p90=p90, p99=p99, min=ends[0], max=ends[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Requests by outcome, and the tokens of the completed ones."""

    sent: int
    completed: int
    failed: int
    cancelled: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The result of one load test. Times in seconds.

    `send_lag`: how late a request's turn came. `loop_lag`: how late the event loop ran a timer, which is how late messages are stamped.
    `concurrency_wait`: turn to send. `harness_lag_p99_s`: the worse of the two lags.
    """

    counts: Counts
    errors: dict[str, int]
    error_examples: dict[str, str]
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    goodput_rps: float
    slo_attainment_fraction: float | None
    request_rps: float
    output_tokens_per_s: float
    duration_s: float
    send_lag: Spread
    loop_lag: Spread
    concurrency_wait: Spread
    harness_lag_p99_s: float
    warnings: tuple[str, ...]


def load_report(
    records: Sequence[RequestRecord], *, duration_s: float, loop_lags_s: Sequence[float], slo: Slo, notes: Sequence[str] = ()
) -> LoadReport:
    """The figures of a run of `duration_s`; requests that were never sent do not count. `notes` are warnings of the caller's own."""
    sent = [record for record in records if record.sent_s is not None]
    completed = [record for record in sent if record.outcome is Outcome.COMPLETED]
    failed = [record for record in sent if record.outcome is Outcome.FAILED]
    counts = Counts(
        sent=len(sent),
        completed=len(completed),
        failed=len(failed),
        cancelled=len(sent) - len(completed) - len(failed),
        prompt_tokens=sum(record.prompt_tokens for record in completed),
        output_tokens=sum(record.output_tokens for record in completed),
    )
    good = sum(record.meets(slo) for record in completed)
    ttft, itl = spread(record.ttft_s for record in completed), spread(gap_s for record in completed for gap_s in record.gaps_s)
    turns = [(record.scheduled_s, record.turn_s, record.sent_s) for record in sent]
    send_lag = spread(max(0.0, turn_s - scheduled_s) for scheduled_s, turn_s, _ in turns if turn_s is not None)
    loop_lag = spread(loop_lags_s)
    return LoadReport(
        counts=counts,
        errors=dict(Counter(record.reason for record in failed).most_common()),
        error_examples={record.reason: record.message[:_MAX_EXAMPLE_CHARS] for record in reversed(failed)},
        ttft=ttft,
        itl=itl,
        tpot=spread(record.tpot_s for record in completed),
        e2e=spread(record.e2e_s for record in completed),
        goodput_rps=_per_s(good, duration_s),
        slo_attainment_fraction=good / (len(completed) + len(failed)) if completed or failed else None,
        request_rps=_per_s(len(completed), duration_s),
        output_tokens_per_s=_per_s(counts.output_tokens, duration_s),
        duration_s=duration_s,
        send_lag=send_lag,
        loop_lag=loop_lag,
        concurrency_wait=spread(sent_s - turn_s for _, turn_s, sent_s in turns if turn_s is not None and sent_s is not None),
        harness_lag_p99_s=max(send_lag.p99 or 0.0, loop_lag.p99 or 0.0),
        warnings=(*notes, *_token_warnings(completed), *_lag_warnings(send_lag, loop_lag, ttft, itl)),
    )


def _per_s(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0.0 else 0.0


def _token_warnings(completed: Sequence[RequestRecord]) -> list[str]:
    uncounted = sum(record.is_counted_by_message for record in completed)
    short = sum(record.output_tokens < record.asked_tokens and not record.is_counted_by_message for record in completed)
    warnings = []
    if uncounted:
        warnings.append(f"the server sent no usage for {uncounted} requests: their output tokens are counted one a message")
    if short:
        warnings.append(f"{short} requests had fewer output tokens than asked for: the server may not know ignore_eos")
    return warnings


def _lag_warnings(send_lag: Spread, loop_lag: Spread, ttft: Spread, itl: Spread) -> list[str]:
    """A line for the lag that is largest beside a figure it enters, where that is large."""
    pairs = (("sent requests", send_lag, "TTFT", ttft), ("read messages", loop_lag, "TTFT", ttft), ("read messages", loop_lag, "ITL", itl))
    shares = [
        (lag.p99 / figure.p99, f"{what} late by {lag.p99 * 1000:.1f} ms at p99, beside a p99 {name} of {figure.p99 * 1000:.1f} ms")
        for what, lag, name, figure in pairs
        if lag.p99 is not None and figure.p99 and lag.p99 > max(_LAG_FLOOR_S, _LAG_FRACTION * figure.p99)
    ]
    return [f"doubtful: the load generator {max(shares)[1]}; give it a lower rate or an idle machine"] if shares else []
