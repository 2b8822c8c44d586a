"""The command `tandem chaos`. What it needs is imported inside it, so that help comes at once.

Exit status: 0 every promise held, 1 one did not, 2 an error of ours, 130 after Ctrl-C (with the report of what there was).
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from tandem.chaos.run import ChaosOptions, ChaosResult

_EXIT_BROKEN_PROMISE = 1


class Bug(StrEnum):
    """Names for --seeded-bug."""

    DROPPED_CHUNK = "dropped_chunk"
    REPEATED_TOKEN = "repeated_token"
    LEAKED_LEASE = "leaked_lease"


def chaos(
    seed: Annotated[int, typer.Option(min=0, help="The same seed plans the same faults and requests.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Also write one JSON object there.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="PATH", help="Also write a page with a timeline there.")] = None,
    logs: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the logs of all processes there.")] = None,
    requests: Annotated[int, typer.Option(min=200, help="Requests at least.")] = 200,
    prefill: Annotated[int, typer.Option(min=1, help="Prefill replicas.")] = 2,
    decode: Annotated[int, typer.Option(min=1, help="Decode replicas.")] = 2,
    routers: Annotated[int, typer.Option(min=2, help="Routers; one of them is broken at a time.")] = 2,
    minutes: Annotated[float, typer.Option(min=1.0, help="Time limit; faults that do not fit in are not covered.")] = 15.0,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second, Poisson.")] = 1.0,
    model: Annotated[str, typer.Option(metavar="PATH_OR_NAME", help="The model; prompts are the bundled one's tokens.")] = "bundled",
    quick: Annotated[bool, typer.Option("--quick", help="Few requests and faults: see whether it works, prove nothing.")] = False,
    seeded_bug: Annotated[Bug | None, typer.Option(hidden=True)] = None,
) -> None:
    """Start a platform of its own, break its parts under load, and check every token."""
    import sys

    from rich.console import Console

    from tandem.chaos.page import chaos_page
    from tandem.chaos.report import coverage_table, fault_table, summary_lines
    from tandem.chaos.run import ChaosOptions
    from tandem.chaos.streams import SeededBug
    from tandem.chaos.verdict import holds
    from tandem.cli_report import write_report

    options = ChaosOptions(
        seed=seed,
        requests=requests,
        prefill=prefill,
        decode=decode,
        routers=routers,
        minutes=minutes,
        rate_rps=rate,
        model=model,
        logs=logs,
        bug=None if seeded_bug is None else SeededBug(seeded_bug.value),
    )
    result = _run(options.made_quick() if quick else options, Console(stderr=True, highlight=False, markup=False, emoji=False))
    report = result.report
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
    console.print(fault_table(report))
    console.print(coverage_table(report))
    for line in summary_lines(report):
        typer.echo(line)
    if json is not None:
        write_report(json, report)
    if html is not None:
        _write_page(html, chaos_page(report, result.seen, result.started_s))
    if report["is_interrupted"]:
        raise KeyboardInterrupt
    if not holds(report):
        raise typer.Exit(_EXIT_BROKEN_PROMISE)


def _run(options: "ChaosOptions", console: "Console") -> "ChaosResult":
    """Shows where it is; Ctrl-C ends the load and leaves the report, before the load it ends all."""
    import asyncio
    import contextlib
    import signal

    from tandem.chaos.run import Stop, run_chaos

    async def run(status: "Status | None") -> "ChaosResult":
        stop, main = Stop(), asyncio.current_task()
        assert main is not None

        def interrupt() -> None:
            if stop.is_loading and not stop.is_asked.is_set():
                stop.is_asked.set()
            else:
                main.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        return await run_chaos(options, console.print if status is None else status.update, stop)

    with console.status("starting") if console.is_terminal else contextlib.nullcontext() as status:
        try:
            return asyncio.run(run(status))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def _write_page(path: Path, page: str) -> None:
    """Makes the folders above it; raises ConfigError where that cannot be done."""
    from tandem.errors import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
