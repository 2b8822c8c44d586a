"""The `tandem` command. What a command needs is imported inside it, so that help and errors come at once.

Exit status: 0 done, 1 where a load test had failed requests or a promise was broken, 2 an error of ours or a wrong argument (one
line on stderr), 130 after Ctrl-C.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tandem.chaos.command import chaos
from tandem.errors import InvalidRequestError, TandemError
from tandem.explain_cli import explain
from tandem.kv_cli import kv_app
from tandem.sim.command import simulate

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.completion import Completion
    from tandem.generate_request import GenerateOptions, Prompt

_EXIT_FAILED_REQUESTS = 1
_EXIT_ERROR = 2
_EXIT_INTERRUPTED = 130

Endpoint = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="A router. Default: TANDEM_ENDPOINT, else the newest `tandem up` of this user.")
]
Json = Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Also write one JSON object there.")]
QueryTimeout = Annotated[float, typer.Option("--timeout-s", help="Seconds to wait for the answer.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits. `arguments` are those of the command line where None."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own log lines are not for users
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        _app()(args=arguments, prog_name="tandem")
    except TandemError as error:
        typer.echo(f"tandem: error: {' '.join(error.message.split())}", err=True)
        sys.exit(_EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(_EXIT_INTERRUPTED)


def _app() -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(_options)
    for command in (up, down, generate, models, status, top, scale, drain, explain, bench, simulate, chaos):
        app.command()(command)
    app.add_typer(kv_app, name="kv")
    return app


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from tandem import __version__

        typer.echo(f"tandem {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Serves large language models with prefill and decode on separate workers."""


def up(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A cluster's TOML file; flags and TANDEM_* go before it.")] = None,
    model: Annotated[str | None, typer.Option(metavar="PATH_OR_NAME", help="The model to serve. Default: the bundled one.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="vllm, or simulated: all is real but the model, whose steps take the time of a profile. Default: vllm."),
    ] = None,
    step_profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A simulated engine's profile, TOML. Default: the bundled model on one CPU core.")
    ] = None,
    slowdown: Annotated[
        list[str] | None, typer.Option(metavar="REPLICA=FACTOR", help="A simulated replica whose steps take longer; may be repeated.")
    ] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill replicas at the start. Default: 1.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Decode replicas at the start. Default: 1.")] = None,
    min_prefill: Annotated[int | None, typer.Option(min=0, help="Prefill replicas at least; 0 lets an idle model go to zero.")] = None,
    max_prefill: Annotated[int | None, typer.Option(min=0, help="Prefill replicas at most. Default: as many as at the start.")] = None,
    min_decode: Annotated[int | None, typer.Option(min=0, help="Decode replicas at least.")] = None,
    max_decode: Annotated[int | None, typer.Option(min=0, help="Decode replicas at most.")] = None,
    routers: Annotated[int | None, typer.Option(min=1, help="Routers. Default: 1.")] = None,
    autoscalers: Annotated[int | None, typer.Option(min=1, help="Autoscalers; one leads, the others stand by. Default: 1.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that everything listens on. Default: 127.0.0.1.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="The first router's gRPC port; 0 for any free one. Default: 8470.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(min=0, max=65_535, help="The first router's HTTP port. Default: 8480.")] = None,
    cluster: Annotated[str | None, typer.Option(help="The cluster's id. Default: made up.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="A Redis server to use. Default: REDIS_URL, else one of its own.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster to use. Default: RAY_ADDRESS, else one of its own.")] = None,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Bytes of KV cache in each replica.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Weights and activations: float32, bfloat16, ... Default: auto.")] = None,
    store_dir: Annotated[Path | None, typer.Option(help="Folder of KV blocks. Default: one in /dev/shm, removed at the end.")] = None,
    kv_disk: Annotated[Path | None, typer.Option(help="Folder on a disk where KV blocks outlive the cluster. Default: none.")] = None,
    kv_disk_bytes: Annotated[int | None, typer.Option(help="Bytes of it. Default: 16 GiB.")] = None,
    kv_redis_bytes: Annotated[int | None, typer.Option(help="Memory of a Redis that KV blocks overflow into. Default: 0, none.")] = None,
    event_log: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for the routers' event logs, which replay to the same decisions.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="How routers rank prefill workers. Default: predicted_ttft.")] = None,
    one_worker_max_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Prompt tokens to compute up to which one worker may do both. Default: any, where it is quicker."),
    ] = None,
) -> None:
    """Start a cluster on this machine and serve until Ctrl-C."""
    paths = {"store_dir": store_dir, "kv_disk": kv_disk, "event_log": event_log}
    folders = {name: None if folder is None else str(folder) for name, folder in paths.items()}
    given = {**locals(), **folders}
    settings = {name: given.pop(name) for name in ("policy", "one_worker_max_tokens")}
    given["router"] = {name: value for name, value in settings.items() if value is not None}
    for name in ("paths", "folders", "config", "slowdown"):
        del given[name]
    from tandem.cluster_config import load_cluster_config, parse_slowdowns, read_toml
    from tandem.up_terminal import run_up

    given["step_profile"] = None if step_profile is None else read_toml(step_profile)
    given["slowdowns"] = None if slowdown is None else parse_slowdowns(slowdown)
    run_up(load_cluster_config(config, given))


def down(
    cluster: Annotated[str | None, typer.Option(help="The cluster's id. Default: the only one there is.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All clusters of this user on this machine.")] = False,
) -> None:
    """Stop a cluster on this machine and clear away what is left of it."""
    from tandem.down import choose_clusters, stop_cluster

    for name in choose_clusters(cluster, is_all=every):
        stop_cluster(name)
        typer.echo(f"stopped {name}")


def scale(
    targets: Annotated[
        list[str], typer.Argument(metavar="ROLE=N...", help="prefill=2 decode=1; auto instead of a number gives a pool back.")
    ],
    model: Annotated[str, typer.Option(help="Default: the only model served.")] = "",
    for_s: Annotated[float, typer.Option("--for-s", min=0.0, help="Seconds after which scaling is automatic again; 0: never.")] = 0.0,
    endpoint: Endpoint = None,
    timeout_s: QueryTimeout = 10.0,
) -> None:
    """Set how many replicas there are, by hand."""
    from tandem.cli_report import parse_target
    from tandem.sync_client import Client

    parsed = [parse_target(text, model=model, expires_in_s=for_s) for text in targets]
    with Client(endpoint) as client:
        client.scale(parsed, timeout_s=timeout_s)


def drain(
    replica: Annotated[str, typer.Argument(help="A replica's id, as `tandem status` shows it.")],
    endpoint: Endpoint = None,
    timeout_s: QueryTimeout = 10.0,
) -> None:
    """Have a replica take nothing new; once it is idle another one replaces it."""
    from tandem.sync_client import Client

    with Client(endpoint) as client:
        client.drain(replica, timeout_s=timeout_s)


def top(
    endpoint: Endpoint = None,
    interval_s: Annotated[float, typer.Option("--interval-s", min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show the replicas, their state and load, and predicted times beside actual ones, live; Ctrl-C ends it."""
    import time

    from rich.console import Group
    from rich.live import Live

    from tandem.cli_report import pools_caption, predictions_table, rates_caption, status_table
    from tandem.sync_client import Client

    with Client(endpoint) as client, Live(console=_console(), auto_refresh=False) as live:
        before, before_s = client.status(), time.monotonic()
        while True:
            found, now_s = client.status(), time.monotonic()
            table = status_table(found)
            table.caption = "\n".join(filter(None, (pools_caption(found), rates_caption(before, found, now_s - before_s))))
            live.update(Group(*filter(None, (table, predictions_table(found)))), refresh=True)
            before, before_s = found, now_s
            time.sleep(interval_s)


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's chat message.")] = False,
    endpoint: Endpoint = None,
    model: Annotated[str | None, typer.Option(help="Default: the only model served.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Output tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End where this text appears; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Seconds for the whole request.")] = 600.0,
    json: Json = None,
    receipt: Annotated[bool, typer.Option("--receipt", help="Print where the time went, on stderr.")] = False,
) -> None:
    """Send one prompt and print the output as it comes."""
    import asyncio

    from tandem.cli_report import generate_report, receipt_line, write_report
    from tandem.generate_request import GenerateOptions

    text = _standard_input() if prompt == "-" else prompt
    options = GenerateOptions(
        max_tokens=max_tokens, temperature=temperature, stop=stop or (), seed=seed, timeout_s=timeout_s, model=model or ""
    )
    completion = asyncio.run(_print_stream(endpoint, [{"role": "user", "content": text}] if chat else text, options))
    if receipt:
        typer.echo("no receipt came" if completion.receipt is None else receipt_line(completion.receipt), err=True)
    if json is not None:
        write_report(json, generate_report(completion))


def models(endpoint: Endpoint = None, timeout_s: QueryTimeout = 10.0, json: Json = None) -> None:
    """List the models served."""
    from tandem.cli_report import models_report, models_table, write_report
    from tandem.sync_client import Client

    with Client(endpoint) as client:
        found = client.models(timeout_s=timeout_s)
    _console().print(models_table(found))
    if json is not None:
        write_report(json, models_report(found))


def status(endpoint: Endpoint = None, timeout_s: QueryTimeout = 10.0, json: Json = None) -> None:
    """Show the replicas, their state and load, and what is wrong with the KV stores."""
    from tandem.cli_report import status_report, status_table, write_report
    from tandem.kv_stats import store_troubles
    from tandem.sync_client import Client

    with Client(endpoint) as client:
        found = client.status(timeout_s=timeout_s)
    troubles = store_troubles(found, timeout_s=min(timeout_s, 2.0))
    _console().print(status_table(found))
    for line in troubles:
        typer.echo(line)
    if json is not None:
        write_report(json, {**status_report(found), "store_troubles": troubles})


def bench(
    endpoint: Endpoint = None,
    url: Annotated[str | None, typer.Option(metavar="http://HOST:PORT", help="An OpenAI server instead of a router.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the only model served.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, Poisson; inf: all at once. Default: 1, or the trace's own.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Requests at most. Default: 100, or all of the duration or trace.")] = None,
    duration_s: Annotated[float | None, typer.Option("--duration-s", help="Seconds in which requests are sent.")] = None,
    prompt_tokens: Annotated[str | None, typer.Option(metavar="N|LOW:HIGH", help="Prompt tokens of a request. Default: 256.")] = None,
    output_tokens: Annotated[str | None, typer.Option(metavar="N|LOW:HIGH", help="Output tokens of a request. Default: 64.")] = None,
    shared_prefix_tokens: Annotated[int, typer.Option(help="How many of the prompt tokens are the same in all requests.")] = 0,
    vocabulary_tokens: Annotated[int, typer.Option(help="Prompts are random token ids from 3 to below this.")] = 2048,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests in flight at most; the loop is then not open. Default: no limit.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests at the same times.")] = 0,
    slo_ttft_s: Annotated[float | None, typer.Option("--slo-ttft-s", help="Objective for goodput: time to the first token.")] = None,
    slo_tpot_s: Annotated[float | None, typer.Option("--slo-tpot-s", help="Objective for goodput: mean time of a later token.")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Replay a Mooncake-format trace (JSON lines).")] = None,
    trace_scale: Annotated[float, typer.Option(help="Multiplies the trace's lengths, for smaller models.")] = 1.0,
    warmup: Annotated[int, typer.Option(help="Requests sent before, which do not count.")] = 0,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Default: TANDEM_API_KEY, which other users of the machine do not see.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Seconds for each request.")] = 600.0,
    json: Json = None,
) -> None:
    """Load a router or an OpenAI server with requests and report latency, throughput and goodput."""
    from rich.console import Console

    from tandem.bench.command import run_command
    from tandem.bench.options import BenchOptions
    from tandem.bench.result_table import bench_lines, bench_table
    from tandem.cli_report import write_report

    options = BenchOptions(
        endpoint=endpoint,
        url=url,
        model=model,
        rate_rps=rate,
        requests=requests,
        duration_s=duration_s,
        prompt=prompt_tokens,
        output=output_tokens,
        shared_prefix_tokens=shared_prefix_tokens,
        vocabulary_tokens=vocabulary_tokens,
        concurrency=concurrency,
        seed=seed,
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
        trace=trace,
        trace_scale=trace_scale,
        warmup=warmup,
        timeout_s=timeout_s,
    )
    result = run_command(options, Console(stderr=True), api_key)
    _console().print(bench_table(result))
    for line in bench_lines(result):
        typer.echo(line)
    if json is not None:
        write_report(json, result.as_json())
    if result.is_interrupted:
        raise KeyboardInterrupt
    if result.report.counts.failed:
        raise typer.Exit(_EXIT_FAILED_REQUESTS)


async def _print_stream(endpoint: str | None, prompt: "Prompt", options: "GenerateOptions") -> "Completion":
    """Prints the text as it comes and ends its line, whatever ends the stream.

    On a loop, where Ctrl-C ends the task: in blocking calls it may strike in the midst of gRPC and be lost.
    """
    from tandem.client import AsyncClient
    from tandem.completion import assemble

    chunks = []
    async with AsyncClient(endpoint) as client, client.stream(prompt, **options) as stream:
        try:
            async for chunk in stream:
                chunks.append(chunk)
                if chunk.text:
                    typer.echo(chunk.text, nl=False)
        finally:
            if chunks:
                typer.echo()
        return assemble(chunks, num_choices=1, receipt=stream.receipt)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError("prompt", f"standard input is not UTF-8 ({error.reason} at byte {error.start})") from error


def _console() -> "Console":
    """Plain text where it is no terminal, wide enough that nothing is cut; names from the wire are no markup."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
