"""The command `tandem simulate`. What it needs is imported inside it, so that help comes at once.

Exit status: 0 done, 2 an error of ours, 130 after Ctrl-C.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.sim.run import Run, Scenario, Task
    from tandem.workload import TraceRow

_SYNTHETIC_REQUESTS = 2_000
_CORES = len(os.sched_getaffinity(0))
_LINES = 10  # of progress, where there is no terminal


def simulate(
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Mooncake-format trace (JSON lines). Default: synthetic multi-turn sessions.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each policy; a seed draws arrivals, step noise and the policy's choices.")
    ] = 10,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="May be repeated. Default: all, with ablations and bounds.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option(metavar="local|global", help="May be repeated. Default: both.")] = None,
    prefill: Annotated[int, typer.Option(min=1, help="Prefill replicas.")] = 16,
    decode: Annotated[int, typer.Option(min=1, help="Decode replicas.")] = 16,
    load: Annotated[
        float, typer.Option(min=0.01, max=10.0, help="Prefill seconds of all prompts without caches / (prefill replicas x time).")
    ] = 0.85,
    report_delay_s: Annotated[
        float, typer.Option("--report-delay-s", min=0.0, max=3600.0, help="How late the router learns of loads and stamps.")
    ] = 0.0,
    predictor_noise: Annotated[float, typer.Option(min=0.0, max=5.0, help="Sigma of a log-normal error of every prediction.")] = 0.0,
    slow_replica: Annotated[
        float, typer.Option(min=0.01, max=100.0, metavar="FACTOR", help="One prefill replica is so much slower from half time.")
    ] = 1.0,
    slow_fleet: Annotated[
        float, typer.Option(min=0.01, max=100.0, metavar="FACTOR", help="All replicas are so much slower from half time.")
    ] = 1.0,
    requests: Annotated[int | None, typer.Option(min=2, help="The first so many of the trace. Default: all; 2000 synthetic ones.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at the same time. Default: one a core.")] = _CORES,
    tune: Annotated[bool, typer.Option("--tune", help="Try the peers' parameters instead, and name the best.")] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Also write one JSON object there.")] = None,
) -> None:
    """Replay a workload against simulated engines and compare routing policies; the router's core is the live one."""
    import sys
    import time

    from rich.console import Console

    from tandem.cli_report import write_report
    from tandem.sim.result import result_of, result_tables
    from tandem.sim.run import Scenario
    from tandem.sim.tasks import comparison, tuning
    from tandem.sim.tuning import tuning_report, tuning_table
    from tandem.sim.variants import chosen_settings, chosen_variants

    scenario = Scenario(
        prefill_replicas=prefill,
        decode_replicas=decode,
        load=load,
        report_delay_s=report_delay_s,
        predictor_noise=predictor_noise,
        slow_replica=slow_replica,
        slow_fleet=slow_fleet,
    )
    settings, variants = chosen_settings(setting or []), chosen_variants(policy or [])
    rows = _rows(trace, requests)
    workload = {"trace": None if trace is None else str(trace), "requests": len(rows), "seeds": seeds}
    tasks = tuning(scenario, settings, seeds) if tune else comparison(scenario, settings, variants, seeds)
    began_s = time.monotonic()
    runs = _run(rows, tasks, min(processes, len(tasks)), Console(stderr=True, highlight=False, markup=False, emoji=False))
    wall_s = time.monotonic() - began_s
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
    for table in [tuning_table(runs)] if tune else result_tables(runs):
        console.print(table)
    typer.echo(f"{len(runs)} runs of {len(rows)} requests in {wall_s:.0f} s, {_describe(scenario)}")
    if json is not None:
        write_report(json, tuning_report(runs, workload) if tune else result_of(runs, scenario, workload, wall_s))


def _rows(trace: Path | None, requests: int | None) -> "list[TraceRow]":
    """The trace's, or made up ones. Raises ConfigError."""
    from tandem.errors import ConfigError
    from tandem.sim.arrivals import synthetic_rows
    from tandem.workload import parse_trace

    if trace is None:
        return synthetic_rows(_SYNTHETIC_REQUESTS if requests is None else requests, seed=0)
    try:
        with trace.open(encoding="utf-8") as lines:
            return parse_trace(lines, str(trace), must_be_ordered=True)[:requests]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace: cannot read {trace}: {error}") from error


def _run(rows: "Sequence[TraceRow]", tasks: "Sequence[Task]", processes: int, console: "Console") -> "list[Run]":
    """Shows a bar on a terminal, else a line for each tenth."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tandem.sim.run import run_all

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done, total = 0, len(tasks)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("simulating", total=total)

        def on_done(run: "Run") -> None:
            nonlocal done
            done += 1
            progress.update(bar, advance=1, description=f"{run.task.variant.name} {run.task.seed}")
            if not console.is_terminal and done * _LINES // total > (done - 1) * _LINES // total:
                console.print(f"tandem simulate: {done} of {total} runs done")

        return run_all(rows, tasks, processes=processes, on_done=on_done)


def _describe(scenario: "Scenario") -> str:
    parts = [f"{scenario.prefill_replicas} + {scenario.decode_replicas} replicas of {scenario.profile.name}, load {scenario.load:g}"]
    if scenario.report_delay_s:
        parts.append(f"reports {scenario.report_delay_s:g} s late")
    if scenario.predictor_noise:
        parts.append(f"predictor noise {scenario.predictor_noise:g}")
    if scenario.slow_replica != 1.0:
        parts.append(f"a replica {scenario.slow_replica:g} x slower from half time")
    if scenario.slow_fleet != 1.0:
        parts.append(f"the fleet {scenario.slow_fleet:g} x slower from half time")
    return ", ".join(parts)
