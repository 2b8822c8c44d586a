"""The command `tandem explain`. What it needs is imported inside it, so that help comes at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tandem.explanation import Candidate, Explanation

_COLUMNS = ("cached_tokens", "fetched_tokens", "ahead_s", "wait_s", "own_s", "others_s", "total_s")  # total_s: all other seconds
_DECODE_COLUMNS = ("running_requests", "kv_tokens", "tpot_s", "handoff_gap_s", "rest_s", "is_too_slow")  # rest_s: first token to last


def explain(
    request_id: Annotated[str, typer.Argument(help="A request's id: x-request-id or id of an answer, or request_id of a receipt.")],
    endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Routers. Default: TANDEM_ENDPOINT, else the newest `tandem up` of this user.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Seconds to wait for each router's answer.")] = 10.0,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Also write one JSON object there.")] = None,
) -> None:
    """Show why a request went where it went, waits or was refused, what was predicted, and what it came to.

    Of several choices the first is shown, of several prompts the last; the id shown, with another number behind # or -, shows the others.
    """
    import dataclasses
    import sys

    from rich.console import Console

    from tandem.cli_report import write_report
    from tandem.endpoint import resolve_endpoint

    found = _ask_each(resolve_endpoint(endpoint).split(","), request_id, timeout_s)
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
    console.print(candidates_table(found))
    if (decode := decode_table(found)).row_count:
        console.print(decode)
    if (outcome := outcome_table(found)).row_count:
        console.print(outcome)
    if found.message:
        console.print(f"{found.state}: {found.message} ({found.reason})")
    if json is not None:
        write_report(json, {"schema": "tandem.explain/1", **dataclasses.asdict(found)})


def _ask_each(routers: Sequence[str], request_id: str, timeout_s: float) -> "Explanation":
    """The word of the first router that knows the request. Raises TandemError: NotFoundError only where all could be asked."""
    from tandem.errors import NotFoundError, TandemError
    from tandem.sync_client import Client

    errors: list[TandemError] = []
    for router in routers:
        try:
            with Client(router) as client:
                return client.explain(request_id, timeout_s=timeout_s)
        except TandemError as error:
            errors.append(error)
    raise min(errors, key=lambda error: isinstance(error, NotFoundError))


def candidates_table(explanation: "Explanation") -> "Table":
    """One row a candidate for the prompt, best first."""
    from tandem.explanation import Part

    candidates = [one for one in explanation.candidates if one.part is not Part.DECODE]
    return _table(f"{explanation.request_id}: {explanation.state}{_where(explanation)}", candidates, _COLUMNS)


def _where(explanation: "Explanation") -> str:
    """Its workers, or the one in whose line it is."""
    from tandem.domain import RequestState
    from tandem.explanation import Part

    plan = explanation.plan
    if plan is None or explanation.state is RequestState.WAITING:
        chosen = [one.worker.replica_id for one in explanation.candidates if one.is_chosen and one.part is not Part.DECODE]
        return "".join(f", in the line of {worker}" for worker in chosen)
    workers = " > ".join([*(worker.replica_id for worker in plan.prefill[:1]), plan.decode.replica_id])
    return f", {workers}" + (f" ({plan.one_worker_reason})" if plan.one_worker_reason else "")


def decode_table(explanation: "Explanation") -> "Table":
    """One row a candidate for the tokens after the first, best first; none where one worker does both."""
    from tandem.explanation import Part

    candidates = [one for one in explanation.candidates if one.part is Part.DECODE]
    return _table("decode workers with room", candidates, _DECODE_COLUMNS)


def _table(title: str, candidates: "Sequence[Candidate]", columns: Sequence[str]) -> "Table":
    from rich.table import Table

    table = Table("", "worker", "does", title=title)
    for heading in columns:
        table.add_column(heading, justify="right")
    for candidate in candidates:
        values = [candidate.term(name) for name in columns]
        cells = [
            "" if value is None else f"{value:.4f}" if name.endswith("_s") else f"{value:.0f}"
            for name, value in zip(columns, values, strict=True)
        ]
        table.add_row("*" if candidate.is_chosen else "", candidate.worker.replica_id, candidate.part, *cells)
    return table


def outcome_table(explanation: "Explanation") -> "Table":
    """Predicted against actual; only predicted where it has not ended well."""
    from rich.table import Table

    if explanation.receipt is not None:
        title, terms = "predicted and actual", explanation.receipt.predicted
    else:
        title, terms = "predicted", explanation.predicted if explanation.plan is None else explanation.plan.predicted
    table = Table("term", title=title)
    for heading in ("predicted", "actual"):
        table.add_column(heading, justify="right")
    for term in terms:
        table.add_row(term.name, f"{term.predicted:.4f}", "" if term.actual is None else f"{term.actual:.4f}")
    return table
