"""What a run has shown: tokens against the reference, pauses, recoveries, coverage, and whether all of it holds. Must not measure."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tandem.chaos.cases import Send
from tandem.chaos.schedule import Pair, PlannedFault


class Outcome(StrEnum):
    """How a request ended for its client."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"  # by the harness, on purpose
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One case as the plain engine answers it."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(slots=True, kw_only=True)
class Seen:
    """One request as its client saw it, filled while it runs. Times in seconds of one clock."""

    send: Send
    started_s: float
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprob_token_ids: list[int] | None = None  # None where none were asked for
    finish_reason: str = ""
    times_s: list[float] = field(default_factory=list)  # of messages with tokens
    ended_s: float | None = None
    outcome: Outcome | None = None
    reason: str = ""
    message: str = ""
    attempts: int = 1
    recomputed_tokens: int = 0
    abandoned: list[list[int]] = field(default_factory=list)  # what broken streams had brought, before an HTTP client tried again

    def begin_again(self) -> None:
        """An HTTP client retries after a router fault: what it had is of no use to it."""
        self.abandoned.append(self.token_ids)
        self.token_ids, self.text, self.finish_reason = [], "", ""

    def was_in_flight(self, at_s: float) -> bool:
        """Whether it ran at that moment."""
        return self.started_s <= at_s and (self.ended_s is None or self.ended_s > at_s)

    def longest_gap_s(self, from_s: float, until_s: float) -> float:
        """The longest wait for a message that overlaps the span; 0 where there is none."""
        ends = [*self.times_s, *([] if self.ended_s is None else [self.ended_s])]
        gaps = zip([self.started_s, *ends], ends, strict=False)
        return max((later - earlier for earlier, later in gaps if later > from_s and earlier < until_s), default=0.0)


@dataclass(slots=True, kw_only=True)
class FaultRecord:
    """What became of a planned fault. Times in seconds from the start of the load.

    `recovered_s`: from the fault's end (the kill, the SIGCONT, the connection's return) until everything is ready and a probe is answered;
    None where that did not come to be.
    """

    planned: PlannedFault
    target: str = ""
    at_s: float = 0.0
    ended_s: float = 0.0
    recovered_s: float | None = None
    missing: str = ""  # what was waited for last
    detail: str = ""
    streams_in_flight: int = 0
    streams_continued: int = 0
    streams_failed: int = 0
    pause_s: float | None = None

    @property
    def is_recovered(self) -> bool:
        """Whether it counts as covered."""
        return self.recovered_s is not None

    def as_json(self) -> dict[str, object]:
        """One entry of the report's `faults`."""
        return {
            "kind": f"{self.planned.row}.{self.planned.action}",
            "row": self.planned.row.value,
            "action": self.planned.action.value,
            "target": self.target,
            "at_s": self.at_s,
            "held_s": self.ended_s - self.at_s,
            **{name: getattr(self, name) for name in ("recovered_s", "missing", "detail", "pause_s")},
            **{name: getattr(self, name) for name in ("streams_in_flight", "streams_continued", "streams_failed")},
        }


def mismatch(seen: Seen, expected: Expected) -> str | None:
    """How the answer differs from the reference, or None. Of a stream that was cut short, what came must be a beginning."""
    ours = tuple(seen.token_ids)
    if any(tuple(broken) != expected.token_ids[: len(broken)] for broken in seen.abandoned):
        return "a stream that broke had other tokens"
    for position, (got, wanted) in enumerate(zip(ours, expected.token_ids, strict=False)):
        if got != wanted:
            return f"token {position} is {got}, not {wanted}"
    if len(ours) > len(expected.token_ids):
        return f"{len(ours)} tokens instead of {len(expected.token_ids)}"
    if seen.logprob_token_ids is not None and tuple(seen.logprob_token_ids) != ours:
        return f"log probabilities of {len(seen.logprob_token_ids)} tokens beside {len(ours)} tokens"
    if seen.outcome is not Outcome.COMPLETED:
        return None
    if len(ours) < len(expected.token_ids):
        return f"{len(ours)} tokens instead of {len(expected.token_ids)}"
    if seen.text != expected.text:
        return "other text from the same tokens"
    if seen.finish_reason != expected.finish_reason:
        return f"finish reason {seen.finish_reason!r} instead of {expected.finish_reason!r}"
    return None


def note_streams(fault: FaultRecord, seen: Iterable[Seen], started_s: float) -> None:
    """Writes into the record what the streams in flight at the fault went through, until it had recovered."""
    at_s, until_s = started_s + fault.at_s, started_s + fault.ended_s + (fault.recovered_s or 0.0)
    hit = [one for one in seen if one.was_in_flight(at_s)]
    fault.streams_in_flight = len(hit)
    fault.streams_continued = sum(one.attempts > 1 for one in hit)
    fault.streams_failed = sum(one.outcome is Outcome.FAILED for one in hit)
    fault.pause_s = max((one.longest_gap_s(at_s, until_s) for one in hit), default=None)


def percentile(values: Sequence[float], fraction: float) -> float | None:
    """The smallest value that so many are not above; None of nothing. Of few values the high ones are the maximum."""
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)] if values else None


def coverage(planned: Iterable[PlannedFault], faults: Iterable[FaultRecord]) -> dict[str, dict[str, object]]:
    """By row and action: how many were planned, and how many recovered."""
    wanted, done = Counter(fault.pair for fault in planned), Counter(fault.planned.pair for fault in faults if fault.is_recovered)
    table: dict[str, dict[str, object]] = {}
    for row, action in sorted(wanted):
        table.setdefault(row.value, {})[action.value] = {"planned": wanted[row, action], "covered": done[row, action]}
    return table


def missed(planned: Iterable[PlannedFault], faults: Iterable[FaultRecord]) -> list[Pair]:
    """Pairs that recovered less often than planned."""
    wanted, done = Counter(fault.pair for fault in planned), Counter(fault.planned.pair for fault in faults if fault.is_recovered)
    return sorted(pair for pair in wanted if done[pair] < wanted[pair])


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Gauges above their start, with both values. What was not there before should be 0."""
    return {name: (before.get(name, 0.0), value) for name, value in sorted(after.items()) if value > before.get(name, 0.0) + 1e-9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything that a run has brought together."""

    seed: int
    conditions: Mapping[str, object]
    started_s: float
    seen: Sequence[Seen]
    expected: Sequence[Expected]
    planned: Sequence[PlannedFault]
    faults: Sequence[FaultRecord]
    leaks: Sequence[str]
    found_blocks: int  # damaged ones, by the platform itself
    skipped_sends: int
    is_interrupted: bool


def report_of(findings: Findings) -> dict[str, object]:
    """The report, schema tandem.chaos/1. O(streams x tokens)."""
    seen, faults = findings.seen, findings.faults
    for fault in faults:
        note_streams(fault, seen, findings.started_s)
    found = {one.send.index: what for one in seen if (what := mismatch(one, findings.expected[one.send.case])) is not None}
    recoveries = [fault.recovered_s for fault in faults if fault.recovered_s is not None]
    pauses = [fault.pause_s for fault in faults if fault.pause_s is not None]
    failed = [one for one in seen if one.outcome is Outcome.FAILED]
    lacking = missed(findings.planned, faults)
    return {
        "schema": "tandem.chaos/1",
        "seed": findings.seed,
        "conditions": dict(findings.conditions),
        "requests": len(seen),
        "requests_by_outcome": dict(Counter(one.outcome.value if one.outcome else "unended" for one in seen)),
        "requests_by_transport": dict(Counter(one.send.transport.value for one in seen)),
        "output_tokens": sum(len(one.token_ids) for one in seen),
        "skipped_sends": findings.skipped_sends,
        "failed": len(failed),
        "token_mismatches": len(found),
        "mismatches": [{"request": index, "what": what} for index, what in sorted(found.items())[:50]],
        "leaked": len(findings.leaks),
        "leaks": list(findings.leaks),
        "recovery_p50_s": percentile(recoveries, 0.5),
        "recovery_p99_s": percentile(recoveries, 0.99),
        "pause_p50_s": percentile(pauses, 0.5),
        "pause_max_s": max(pauses, default=None),
        "continued_requests": sum(one.attempts > 1 for one in seen),
        "recomputed_tokens": sum(one.recomputed_tokens for one in seen),
        "corrupt_blocks_found": findings.found_blocks,
        "http_retries": sum(len(one.abandoned) for one in seen),
        "faults": [fault.as_json() for fault in faults],
        "errors": dict(Counter(one.reason for one in failed).most_common()),
        "error_examples": {one.reason: one.message[:300] for one in reversed(failed)},
        "coverage": coverage(findings.planned, faults),
        "missed": [f"{row}.{action}" for row, action in lacking],
        "coverage_complete": not lacking,
        "is_interrupted": findings.is_interrupted,
    }


def holds(report: Mapping[str, object]) -> bool:
    """Whether every promise held: nothing failed, differed or leaked, and every row was covered as planned."""
    return report["failed"] == report["token_mismatches"] == report["leaked"] == 0 and bool(report["coverage_complete"])
