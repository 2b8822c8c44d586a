"""The `tandem` command. What a command needs is imported inside it, so that help and errors come at once.

Exit status: 0 done, 2 an error of ours or a wrong argument (one line on stderr), 130 after Ctrl-C.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tandem.errors import InvalidRequestError, TandemError

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.completion import Completion
    from tandem.generate_request import GenerateOptions, Prompt
    from tandem.sync_client import Client

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
    for command in (up, generate, models, status):
        app.command()(command)
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
    model: Annotated[str | None, typer.Option(metavar="PATH_OR_NAME", help="The model to serve. Default: the bundled one.")] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill replicas.")] = 1,
    decode: Annotated[int, typer.Option(min=0, help="Decode replicas.")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The router's gRPC port; 0 for any free one.")] = 8470,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Bytes of KV cache in each replica.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Weights and activations: float32, bfloat16, ... Default: auto.")] = None,
    store_dir: Annotated[Path | None, typer.Option(help="Folder of KV blocks. Default: one in /dev/shm, removed at the end.")] = None,
) -> None:
    """Start a cluster on this machine and serve until Ctrl-C."""
    from tandem.up import UpOptions, run_up

    defaults = UpOptions()
    run_up(
        UpOptions(
            model=defaults.model if model is None else model,
            prefill=prefill,
            decode=decode,
            port=port,
            kv_cache_bytes=defaults.kv_cache_bytes if kv_cache_bytes is None else kv_cache_bytes,
            dtype=defaults.dtype if dtype is None else dtype,
            store_dir="" if store_dir is None else str(store_dir),
        )
    )


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
    from tandem.cli_report import generate_report, receipt_line, write_report
    from tandem.generate_request import GenerateOptions
    from tandem.sync_client import Client

    text = _standard_input() if prompt == "-" else prompt
    options = GenerateOptions(
        max_tokens=max_tokens, temperature=temperature, stop=stop or (), seed=seed, timeout_s=timeout_s, model=model or ""
    )
    with Client(endpoint) as client:
        completion = _print_stream(client, [{"role": "user", "content": text}] if chat else text, options)
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
    """Show the replicas, their state and load."""
    from tandem.cli_report import status_report, status_table, write_report
    from tandem.sync_client import Client

    with Client(endpoint) as client:
        found = client.status(timeout_s=timeout_s)
    _console().print(status_table(found))
    if json is not None:
        write_report(json, status_report(found))


def _print_stream(client: "Client", prompt: "Prompt", options: "GenerateOptions") -> "Completion":
    """Prints the text as it comes and ends its line, whatever ends the stream."""
    from tandem.completion import assemble

    chunks = []
    with client.stream(prompt, **options) as stream:
        try:
            for chunk in stream:
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
