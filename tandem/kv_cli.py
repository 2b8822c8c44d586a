"""`tandem kv ...`: commands about the KV block store. What a command needs is imported inside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

_EXIT_ERRORS = 1

kv_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The store of KV blocks.")


@kv_app.callback()
def _kv() -> None:
    """The store of KV blocks."""


@kv_app.command()
def bench(
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Also write one JSON object there.")] = None,
    capacity_bytes: Annotated[int | None, typer.Option(help="Bytes of each arena. Default: 1 GiB.")] = None,
    mooncake_python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The Python of an environment that has Mooncake. Default: this one.")
    ] = None,
    repetitions: Annotated[int | None, typer.Option(help="Repetitions of which the median is taken. Default: 9, quick 2.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only see whether it works; the figures mean nothing.")] = False,
) -> None:
    """Measure the store of KV blocks against memcpy and other stores, on this machine, in one run."""
    from rich.console import Console

    from tandem.bench.kv.kv_table import kv_bench_lines, kv_bench_table
    from tandem.bench.kv.options import KvBenchOptions, quick_or_given
    from tandem.bench.kv.run import run_kv_bench
    from tandem.cli_report import write_report

    options = quick_or_given(
        KvBenchOptions(mooncake_python=mooncake_python), is_quick=quick, capacity_bytes=capacity_bytes, repetitions=repetitions
    )
    with _bar(Console(stderr=True)) as show:
        report = run_kv_bench(options, show)
    _console().print(kv_bench_table(report))
    for line in kv_bench_lines(report):
        typer.echo(line)
    if json is not None:
        write_report(json, report)
    if report["errors"]:
        raise typer.Exit(_EXIT_ERRORS)


@kv_app.command()
def replay(
    trace: Annotated[Path, typer.Option(metavar="PATH", help="A trace in Mooncake's format: one JSON object a line, with hash_ids.")],
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Also write one JSON object there.")] = None,
    capacity: Annotated[list[int] | None, typer.Option(metavar="BLOCKS", help="A capacity; may be given several times.")] = None,
) -> None:
    """Replay a trace's blocks through the store's eviction, beside exact LRU, S3-FIFO and the clairvoyant bound."""
    from rich.table import Table

    from tandem.bench.kv_replay import DEFAULT_CAPACITIES_BLOCKS, load_trace, replay_report, replay_rows
    from tandem.cli_report import write_report

    requests = load_trace(trace)
    rows = replay_rows(requests, capacity or DEFAULT_CAPACITIES_BLOCKS)
    table = Table(title=f"Hit rates of {trace.name}: leading blocks, and of exact LRU")
    for title in ("capacity", "policy", "kind", "hit rate", "leading", "of LRU"):
        table.add_column(title, justify="right" if title not in ("policy", "kind") else "left")
    for row in rows:
        ratio = "" if row.ratio_to_lru is None else f"{row.ratio_to_lru:.3f}"
        table.add_row(str(row.capacity_blocks), row.policy, row.kind, f"{row.hit_rate:.4f}", f"{row.leading_hit_rate:.4f}", ratio)
    _console().print(table)
    if json is not None:
        write_report(json, replay_report(requests, rows))


@kv_app.command()
def stats(
    endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="A router. Default: as of `tandem status`.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Seconds to wait for each answer.")] = 10.0,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Also write one JSON object there.")] = None,
) -> None:
    """What the KV stores of a cluster hold, node by node and tier by tier."""
    from tandem.cli_report import write_report
    from tandem.kv_stats import kv_stats, kv_stats_report, kv_stats_table

    found = kv_stats(endpoint, timeout_s=timeout_s)
    _console().print(kv_stats_table(found))
    if json is not None:
        write_report(json, kv_stats_report(found))


def _console() -> "Console":
    """For tables; wide where it is no terminal, so that a file or a pipe gets whole words."""
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)


@contextmanager
def _bar(console: "Console") -> Iterator[Callable[[str, int, int], None]]:
    """Shows the progress on a terminal; drawn by the caller itself, for a thread would take the interpreter away from what is measured."""
    if not console.is_terminal:
        yield lambda words, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("looking at the machine", total=None)
        bar.refresh()
        yield lambda words, done, total: bar.update(task, completed=done, total=total, description=words, refresh=True)
