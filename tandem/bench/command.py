"""One load test from its settings to its report: finds the model, warms up, runs. Must not print results."""

import asyncio
import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from tandem.api_key import KEY_VARIABLE, key_metadata
from tandem.bench.load import LoadRun, Progress
from tandem.bench.openai_target import OpenAITarget
from tandem.bench.options import BenchOptions
from tandem.bench.plan import plan_prompts, plan_requests, read_trace, warmup_requests
from tandem.bench.tandem_target import TandemTarget
from tandem.bench.target import Call, Target, choose_model
from tandem.errors import Reason, UnavailableError
from tandem.report import LoadReport, Outcome, load_report
from tandem.workload import PlannedRequest

OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"
_MAX_CONCURRENT_WARMUPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What a load test found. `workload` are its settings as they were used; `is_interrupted`: Ctrl-C ended it."""

    workload: dict[str, object]
    report: LoadReport
    is_interrupted: bool

    def as_json(self) -> dict[str, object]:
        """The object that --json writes."""
        return {"schema": "tandem.bench/1", "workload": self.workload, **asdict(self.report), "is_interrupted": self.is_interrupted}


def run_command(options: BenchOptions, console: Console, api_key: str | None = None) -> BenchResult:
    """Runs the load test in a process of its own; `console` shows a bar where it is a terminal. Ctrl-C ends the load, not the report.

    `api_key`: else TANDEM_API_KEY, and for `url` else OPENAI_API_KEY. It is in no report.

    Raises ConfigError for wrong settings, UnavailableError where the endpoint cannot be reached, both before anything is sent.
    """
    options.validate()
    _allow_many_connections()
    return uvloop.run(_run_interruptible(options, console, api_key))


async def _run_interruptible(options: BenchOptions, console: Console, api_key: str | None) -> BenchResult:
    loop = asyncio.get_running_loop()

    def start(run: LoadRun) -> None:
        loop.add_signal_handler(signal.SIGINT, run.stop)
        gc.collect()
        gc.freeze()  # the workload lives to the end: the collector need not stop the loop to look through it

    with _bar(console) as show:
        return await run_bench(options, api_key, on_start=start, on_tick=show)


async def run_bench(
    options: BenchOptions,
    api_key: str | None = None,
    *,
    on_start: Callable[[LoadRun], None] | None = None,
    on_tick: Callable[[Progress], None] | None = None,
) -> BenchResult:
    """One load test on the running loop; `on_start` gets the run right before its first request."""
    options.validate()
    rows = read_trace(options)
    target = _open_target(options, api_key)
    try:
        model = choose_model(await target.models(), options.model)
        requests, notes = plan_requests(options, rows, model)
        prompts = plan_prompts(options)

        def prepare(request: PlannedRequest) -> Call:
            return target.prepare(request, prompts.token_ids(request), model.id)

        await _warm_up(warmup_requests(requests, options.warmup), prepare, options.concurrency)
        run = LoadRun(requests, prepare, concurrency=options.concurrency, on_tick=on_tick)
        if on_start is not None:
            on_start(run)
        await run.run()
    finally:
        await target.close()
    report = load_report(run.records, duration_s=run.duration_s, loop_lags_s=run.loop_lags_s, slo=options.slo, notes=notes)
    workload = {
        "endpoint_kind": target.kind,
        "endpoint": target.address,
        "model": model.id,
        "engine": model.engine,
        **options.described(),
        "requests": len(requests),
        "mean_prompt_tokens": sum(request.prompt_tokens for request in requests) / len(requests),
        "mean_output_tokens": sum(request.output_tokens for request in requests) / len(requests),
    }
    return BenchResult(workload=workload, report=report, is_interrupted=run.is_stopped)


def _open_target(options: BenchOptions, api_key: str | None) -> Target:
    if options.url is None:
        return TandemTarget(options.endpoint, timeout_s=options.timeout_s, api_key=api_key)
    if api_key is None and not os.environ.get(KEY_VARIABLE):
        api_key = os.environ.get(OPENAI_KEY_VARIABLE)
    return OpenAITarget(options.url, timeout_s=options.timeout_s, headers=key_metadata(api_key))


async def _warm_up(requests: list[PlannedRequest], prepare: Callable[[PlannedRequest], Call], concurrency: int | None) -> None:
    """Sends them all at once; raises UnavailableError where one fails."""
    run = LoadRun(requests, prepare, concurrency=min(_MAX_CONCURRENT_WARMUPS, concurrency or _MAX_CONCURRENT_WARMUPS))
    await run.run()
    failed = next((record for record in run.records if record.outcome is Outcome.FAILED), None)
    if failed is not None:
        raise UnavailableError(f"a warm-up request failed ({failed.reason}): {failed.message}", reason=Reason.NO_REPLICA)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[Progress], None] | None]:
    """What shows the progress, drawn by the loop itself: a thread would take the interpreter away from it. None where nobody looks."""
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with ProgressBar(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(progress: Progress) -> None:
            words = f"{progress.in_flight} in flight, {progress.failed} failed"
            bar.update(task, completed=progress.completed + progress.failed, total=progress.total, description=words, refresh=True)

        yield show


def _allow_many_connections() -> None:
    """Every request in flight to an OpenAI server is a connection: open files up to what this user may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
