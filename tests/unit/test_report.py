"""The figures of a load test, against numbers worked out by hand."""

import numpy as np
import pytest

from tandem.domain import Slo
from tandem.report import LoadReport, Outcome, RequestRecord, Spread, load_report, spread


def record(*times_s: float, sent_s: float = 10.0, tokens: int = 1, asked_tokens: int = 0) -> RequestRecord:
    """A completed request whose messages of `tokens` tokens came at these times after the send."""
    made = RequestRecord(scheduled_s=sent_s, prompt_tokens=100, asked_tokens=asked_tokens, turn_s=sent_s, sent_s=sent_s)
    for time_s in times_s:
        made.take_tokens(sent_s + time_s, tokens)
    made.end()
    return made


def report(
    *records: RequestRecord,
    duration_s: float = 10.0,
    slo: Slo | None = None,
    loop_lags_s: tuple[float, ...] = (),
    notes: tuple[str, ...] = (),
) -> LoadReport:
    return load_report(records, duration_s=duration_s, loop_lags_s=loop_lags_s, slo=slo or Slo(), notes=notes)


def test_percentiles_are_interpolated_as_numpy_does() -> None:
    values = [0.5, 0.1, 0.9, 0.3, 0.2, 7.0]
    found = spread(values)
    assert (found.count, found.min, found.max) == (6, 0.1, 7.0)
    assert found.mean == pytest.approx(1.5)
    assert found.p50 == pytest.approx(0.4)
    assert found.p90 == pytest.approx(float(np.percentile(values, 90)))
    assert found.p99 == pytest.approx(0.9 + 0.95 * 6.1)


def test_a_spread_leaves_out_what_is_undefined() -> None:
    assert spread([None, 2.0, None]).count == 1
    assert spread([None]) == Spread()


def test_times_of_one_request_follow_their_definitions() -> None:
    one = record(0.5, 0.7, 1.5)
    assert one.outcome is Outcome.COMPLETED
    assert one.ttft_s == pytest.approx(0.5)
    assert list(one.gaps_s) == pytest.approx([0.2, 0.8])
    assert one.e2e_s == pytest.approx(1.5)
    assert one.tpot_s == pytest.approx(0.5)


def test_a_message_of_several_tokens_is_one_gap_and_all_its_tokens_count_for_tpot() -> None:
    one = record(0.5, 1.4, tokens=5)
    assert list(one.gaps_s) == pytest.approx([0.9])
    assert one.output_tokens == 10
    assert one.tpot_s == pytest.approx(0.1)


def test_one_token_has_no_tpot_and_meets_any_objective_for_it() -> None:
    one = record(0.5)
    assert one.tpot_s is None
    assert one.meets(Slo(tpot_s=1e-9))
    assert report(one).itl == Spread()


def test_a_request_that_was_not_answered_has_no_times() -> None:
    one = RequestRecord(scheduled_s=0.0, prompt_tokens=1, asked_tokens=1)
    assert (one.ttft_s, one.e2e_s, one.tpot_s) == (None, None, None)
    one.first_token_s = one.last_token_s = 1.0
    assert (one.ttft_s, one.e2e_s, one.tpot_s) == (None, None, None)


def test_a_stream_without_output_has_failed() -> None:
    one = record()
    assert (one.outcome, one.reason) == (Outcome.FAILED, "no_tokens")
    assert not one.meets(Slo())


def test_a_failure_stays_one_at_the_end_of_the_stream() -> None:
    one = RequestRecord(scheduled_s=0.0, prompt_tokens=1, asked_tokens=1, sent_s=0.0)
    one.take_tokens(1.0, 1)
    one.fail("http_500", "no")
    one.end()
    assert (one.outcome, one.reason) == (Outcome.FAILED, "http_500")


def test_goodput_counts_requests_that_meet_every_objective() -> None:
    fast, late, slow = record(0.5, 0.6), record(2.0, 2.1), record(0.5, 1.5)
    assert report(fast, late, slow).goodput_rps == pytest.approx(0.3)
    assert report(fast, late, slow, slo=Slo(ttft_s=1.0)).goodput_rps == pytest.approx(0.2)
    both = report(fast, late, slow, slo=Slo(ttft_s=1.0, tpot_s=0.2))
    assert both.goodput_rps == pytest.approx(0.1)
    assert both.slo_attainment_fraction == pytest.approx(1 / 3)


def test_failed_cancelled_and_unsent_requests_are_counted_apart_and_enter_no_figure() -> None:
    failed, cancelled = record(3.0), record(4.0)
    failed.fail("queue_full", "x" * 1000)
    cancelled.outcome = Outcome.CANCELLED
    unsent = RequestRecord(scheduled_s=0.0, prompt_tokens=1, asked_tokens=1)
    again = record()
    found = report(record(1.0, 2.0), failed, cancelled, unsent, again)
    assert (found.counts.sent, found.counts.completed, found.counts.failed, found.counts.cancelled) == (4, 1, 2, 1)
    assert (found.counts.prompt_tokens, found.counts.output_tokens) == (100, 2)
    assert found.ttft.max == pytest.approx(1.0)
    assert found.errors == {"queue_full": 1, "no_tokens": 1}
    assert found.error_examples == {"no_tokens": "the stream ended without any output", "queue_full": "x" * 300}
    assert found.slo_attainment_fraction == pytest.approx(1 / 3)


def test_rates_are_over_the_whole_run() -> None:
    found = report(record(1.0, 2.0, 3.0), record(1.0), duration_s=8.0)
    assert found.request_rps == pytest.approx(0.25)
    assert found.output_tokens_per_s == pytest.approx(0.5)


def test_a_run_that_sent_nothing_has_a_report() -> None:
    found = report(duration_s=0.0)
    assert (found.counts.sent, found.request_rps, found.slo_attainment_fraction, found.harness_lag_p99_s) == (0, 0.0, None, 0.0)
    assert found.ttft == Spread()


def test_lag_is_the_turn_after_the_schedule_and_a_wait_for_a_place_is_none() -> None:
    late = record(1.0)
    late.turn_s, late.sent_s = late.scheduled_s + 0.25, late.scheduled_s + 0.75
    early = record(1.0)
    early.turn_s = early.scheduled_s - 0.0004
    found = report(late, early)
    assert found.send_lag.max == pytest.approx(0.25)
    assert found.send_lag.min == 0.0
    assert found.concurrency_wait.max == pytest.approx(0.5)
    assert found.harness_lag_p99_s == found.send_lag.p99


def test_a_record_whose_turn_is_unknown_has_no_lag() -> None:
    one = record(1.0)
    one.turn_s = None
    assert report(one).send_lag == report(one).concurrency_wait == Spread()


def test_a_lag_that_is_large_beside_a_figure_is_a_warning() -> None:
    found = report(record(1.0, 1.01), loop_lags_s=(0.005,))
    assert [line for line in found.warnings if "read messages late by 5.0 ms at p99, beside a p99 ITL of 10.0 ms" in line]
    assert len(found.warnings) == 1
    assert found.harness_lag_p99_s == 0.005


def test_a_small_lag_is_no_warning() -> None:
    assert report(record(1.0, 1.01), loop_lags_s=(0.0019,)).warnings == ()
    assert report(record(1.0, 2.0), loop_lags_s=(0.05,)).warnings == ()


def test_tokens_that_were_counted_by_message_or_too_few_are_a_warning() -> None:
    by_message = record(1.0, asked_tokens=9)
    by_message.is_counted_by_message = True
    found = report(by_message, record(1.0, asked_tokens=2), record(1.0, asked_tokens=1), notes=("cut",))
    assert found.warnings[0] == "cut"
    assert "no usage for 1 requests" in found.warnings[1]
    assert "1 requests had fewer output tokens" in found.warnings[2]
