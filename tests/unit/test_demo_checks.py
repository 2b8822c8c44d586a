"""What the demonstration concludes where something went wrong: figures without a value, never an exception."""

from tandem.demo.calls import Run
from tandem.demo.checks import exactness, timings
from tandem.domain import Receipt, RequestId


def run() -> Run:
    return Run(token_ids=[1, 2], times_s=[0.1, 0.2, 0.3], receipt=Receipt(request_id=RequestId("r")))


def test_where_nothing_was_handed_off_the_report_says_so() -> None:
    report = exactness([[7]], [run()], [run()], [[1, 2]])
    assert (report["token_exact"], report["handed_off"], report["decode_recomputed_tokens_max"]) == (1, 0, 0)


def test_where_nothing_was_handed_off_its_gap_has_no_median() -> None:
    report = timings([run()], [run()], [run()])
    assert (report["handoff_gap_p50_s"], report["timed_prompts"]) == (None, 1)
