"""The result of a load test for people: a table of times, then rates, errors and warnings. Must not compute figures."""

from collections.abc import Iterator

from rich.table import Table

from tandem.bench.command import BenchResult
from tandem.cluster_config import SIMULATED
from tandem.report import Spread

_COLUMNS = ("mean", "p50", "p90", "p99", "min", "max")


def bench_table(result: BenchResult) -> Table:
    """The times in milliseconds."""
    workload, report = result.workload, result.report
    table = Table("ms", title=f"{workload['model']} at {workload['endpoint']} ({workload['endpoint_kind']})")
    for heading in _COLUMNS:
        table.add_column(heading, justify="right")
    for name, spread in (("TTFT", report.ttft), ("ITL", report.itl), ("TPOT", report.tpot), ("E2E", report.e2e)):
        table.add_row(name, *_cells(spread))
    return table


def bench_lines(result: BenchResult) -> Iterator[str]:
    """Counts and rates, then what went wrong."""
    report = result.report
    counts = report.counts
    cancelled = f", {counts.cancelled} cancelled" if counts.cancelled else ""
    yield f"requests: {counts.sent} sent, {counts.completed} completed, {counts.failed} failed{cancelled}, in {report.duration_s:.2f} s"
    if result.workload.get("engine") == SIMULATED:
        yield "the engine is simulated: times are those of its step profile, not of a model"
    yield f"tokens: {counts.prompt_tokens} prompt, {counts.output_tokens} output"
    yield (
        f"rates: {report.request_rps:.3f} requests/s, goodput {report.goodput_rps:.3f} requests/s,"
        f" {report.output_tokens_per_s:.1f} output tokens/s"
    )
    yield f"the load generator's own lag: {report.harness_lag_p99_s * 1000:.1f} ms at p99"
    for reason, count in report.errors.items():
        yield f"failed: {count} x {reason}: {report.error_examples[reason]}"
    for warning in report.warnings:
        yield f"warning: {warning}"
    if result.is_interrupted:
        yield "interrupted: the figures are of the requests that were complete"


def _cells(spread: Spread) -> tuple[str, ...]:
    values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.min, spread.max)
    return tuple("-" if value is None else f"{value * 1000:.2f}" for value in values)
