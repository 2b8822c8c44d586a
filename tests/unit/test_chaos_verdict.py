"""The judge of a chaos run sees each way in which a promise can be broken."""

from dataclasses import replace

import pytest

from tandem.chaos.cases import Send, Transport
from tandem.chaos.page import chaos_page
from tandem.chaos.report import coverage_table, fault_table, summary_lines
from tandem.chaos.schedule import Action, PlannedFault, Row
from tandem.chaos.verdict import Expected, FaultRecord, Findings, Outcome, Seen, grown, holds, mismatch, percentile, report_of

EXPECTED = Expected(token_ids=(1, 2, 3, 4), text="abcd", finish_reason="length")
FAULT = PlannedFault(number=0, row=Row.STORE, action=Action.KILL, hold_s=0.0, pick=0.5, lull_s=1.0)


def stream(*token_ids: int, outcome: Outcome | None = Outcome.COMPLETED, text: str = "abcd", finish_reason: str = "length") -> Seen:
    send = Send(index=0, case=0, gap_s=0.1, transport=Transport.SDK, first_router=0.0)
    seen = Seen(send=send, started_s=100.0, token_ids=list(token_ids), text=text, finish_reason=finish_reason, outcome=outcome)
    seen.times_s, seen.ended_s = [101.0, 101.1, 104.0], 104.5
    return seen


def findings(*seen: Seen, fault: FaultRecord | None = None, leaks: tuple[str, ...] = ()) -> Findings:
    return Findings(
        seed=1,
        conditions={"cores": 2},
        started_s=100.0,
        seen=seen,
        expected=[EXPECTED],
        planned=[FAULT],
        faults=[fault or FaultRecord(planned=FAULT, target="store", at_s=2.0, ended_s=2.0, recovered_s=1.5)],
        leaks=leaks,
        found_blocks=3,
        skipped_sends=0,
        is_interrupted=False,
    )


def test_the_reference_s_answer_is_no_mismatch() -> None:
    assert mismatch(stream(1, 2, 3, 4), EXPECTED) is None


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (stream(1, 2, 9, 4), "token 2 is 9, not 3"),
        (stream(1, 2, 2, 3, 4), "token 2 is 2, not 3"),
        (stream(1, 3, 4), "token 1 is 3, not 2"),
        (stream(1, 2, 3, 4, 5), "5 tokens instead of 4"),
        (stream(1, 2, 3), "3 tokens instead of 4"),
        (stream(1, 2, 3, 4, text="abc"), "other text"),
        (stream(1, 2, 3, 4, finish_reason="stop"), "finish reason 'stop'"),
        (stream(1, 9, outcome=Outcome.CANCELLED), "token 1 is 9"),
        (stream(1, 9, outcome=Outcome.FAILED), "token 1 is 9"),
    ],
)
def test_a_difference_is_named(seen: Seen, words: str) -> None:
    assert words in (mismatch(seen, EXPECTED) or "")


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.FAILED, None])
def test_of_a_stream_that_was_cut_short_a_beginning_is_right(outcome: Outcome | None) -> None:
    assert mismatch(stream(1, 2, outcome=outcome), EXPECTED) is None


def test_log_probabilities_must_be_those_of_the_tokens() -> None:
    seen = stream(1, 2, 3, 4)
    seen.logprob_token_ids = [1, 2, 3, 4]
    assert mismatch(seen, EXPECTED) is None
    seen.logprob_token_ids = [1, 2, 3]
    assert "log probabilities of 3" in (mismatch(seen, EXPECTED) or "")


def test_what_a_broken_http_stream_had_brought_is_checked_too() -> None:
    seen = stream(1, 9)
    seen.begin_again()
    seen.token_ids, seen.text, seen.finish_reason = [1, 2, 3, 4], "abcd", "length"
    assert "a stream that broke" in (mismatch(seen, EXPECTED) or "")
    seen.abandoned = [[1, 2]]
    assert mismatch(seen, EXPECTED) is None


def test_the_longest_gap_is_that_of_the_span() -> None:
    seen = stream(1, 2, 3)
    assert seen.longest_gap_s(102.0, 103.0) == pytest.approx(2.9)
    assert seen.longest_gap_s(101.02, 101.05) == pytest.approx(0.1)
    assert seen.longest_gap_s(200.0, 201.0) == 0.0
    seen.ended_s = None
    assert seen.was_in_flight(200.0)
    assert seen.longest_gap_s(104.2, 104.4) == 0.0


def test_percentiles_of_few_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([], 0.5) is None


def test_gauges_above_their_start_are_leaks_and_new_ones_must_be_zero() -> None:
    assert grown({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0, "c": 0.0, "d": 1.0}) == {"b": (2.0, 3.0), "d": (0.0, 1.0)}


def test_a_run_without_a_flaw_holds() -> None:
    report = report_of(findings(stream(1, 2, 3, 4)))
    assert holds(report)
    assert report["schema"] == "tandem.chaos/1"
    assert report["pause_max_s"] == pytest.approx(2.9)
    assert report["recovery_p50_s"] == 1.5
    assert report["coverage"] == {"store_service": {"kill": {"planned": 1, "covered": 1}}}


@pytest.mark.parametrize(
    "flawed",
    [
        findings(stream(1, 2, 9, 4)),
        findings(stream(1, 2, outcome=Outcome.FAILED)),
        findings(stream(1, 2, 3, 4), leaks=("router-0 running",)),
        findings(stream(1, 2, 3, 4), fault=FaultRecord(planned=FAULT, missing="replicas")),
        replace(findings(stream(1, 2, 3, 4)), faults=[]),
    ],
)
def test_each_flaw_fails_the_run_and_is_shown(flawed: Findings) -> None:
    report = report_of(flawed)
    assert not holds(report)
    assert len(summary_lines(report)) > 3
    assert "class=bad" in chaos_page(report, flawed.seen, flawed.started_s)


def test_the_page_is_one_file_and_escapes_what_others_said() -> None:
    seen = stream(1, 2, outcome=Outcome.FAILED)
    seen.reason, seen.message = "worker_lost", "<script>"
    unended = stream(1, outcome=None)
    unended.ended_s = None
    found = findings(seen, unended, stream(1, 2, 3, 4))
    page = chaos_page(report_of(found), found.seen, found.started_s)
    assert "<script" not in page
    assert "http" not in page.replace("http_retries", "")
    assert page.count("<rect") >= 4


def test_tables_have_a_row_for_each_fault_and_each_row() -> None:
    report = report_of(findings(stream(1, 2, 3, 4), fault=FaultRecord(planned=FAULT, target="x" * 80, missing="replicas")))
    assert fault_table(report).row_count == 1
    assert coverage_table(report).row_count == 1
