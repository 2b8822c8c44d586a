"""What `tandem chaos` prints: tables and lines from its report. Must not judge: the report says all."""

from collections.abc import Mapping
from typing import cast

from rich.table import Table


def fault_table(report: Mapping[str, object]) -> Table:
    """One row a fault."""
    table = Table(title=f"faults, seed {report['seed']}")
    for title in ("at s", "fault", "target", "held s", "recovered s", "pause s", "streams", "continued", "failed"):
        table.add_column(title, justify="left" if title in ("fault", "target") else "right")
    for fault in cast(list[dict[str, object]], report["faults"]):
        recovered = _figure(fault["recovered_s"]) if fault["recovered_s"] is not None else f"no: {fault['missing']}"
        counts = (str(fault[name]) for name in ("streams_in_flight", "streams_continued", "streams_failed"))
        words = (str(fault["kind"]), _short(str(fault["target"])))
        table.add_row(_figure(fault["at_s"]), *words, _figure(fault["held_s"]), recovered, _figure(fault["pause_s"]), *counts)
    return table


def coverage_table(report: Mapping[str, object]) -> Table:
    """One row a row of the promises: each action's covered of planned."""
    table = Table("row", "covered of planned", title="coverage")
    for row, actions in cast(dict[str, dict[str, dict[str, int]]], report["coverage"]).items():
        table.add_row(row, ", ".join(f"{action} {count['covered']}/{count['planned']}" for action, count in actions.items()))
    return table


def summary_lines(report: Mapping[str, object]) -> list[str]:
    """What a reader wants to know first, and each thing that did not hold."""
    lines = [
        f"requests {report['requests']}, failed {report['failed']}, token mismatches {report['token_mismatches']},"
        f" leaked {report['leaked']}",
        f"recovery p50 {_figure(report['recovery_p50_s'])} s, p99 {_figure(report['recovery_p99_s'])} s;"
        f" pause p50 {_figure(report['pause_p50_s'])} s, max {_figure(report['pause_max_s'])} s",
        f"continued requests {report['continued_requests']}, recomputed tokens {report['recomputed_tokens']},"
        f" damaged blocks found {report['corrupt_blocks_found']}, HTTP retries {report['http_retries']}",
    ]
    examples = cast(dict[str, str], report["error_examples"])
    lines += [f"failed: {count} x {reason}: {examples[reason]}" for reason, count in cast(dict[str, int], report["errors"]).items()]
    lines += [f"mismatch: request {item['request']}: {item['what']}" for item in cast(list[dict[str, object]], report["mismatches"])[:10]]
    lines += [f"leaked: {leak}" for leak in cast(list[str], report["leaks"])]
    lines += [f"not covered: {', '.join(cast(list[str], report['missed']))}"] if report["missed"] else []
    return lines


def _figure(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
