"""What the demonstration concludes: timings, exactness, the SDK's and HTTP's answers, the dashboard's metrics. Prints and judges."""

import asyncio
import contextlib
import json
import os
import re
import statistics
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tandem
from tandem.config import EngineConfig
from tandem.demo.calls import MAX_TOKENS, Prompts, Run
from tandem.engine.environment import set_engine_environment
from tandem.engine.model_files import bundled_model_path

_HTTP_TIMEOUT_S = 60.0
_DASHBOARD = Path("deploy/grafana/tandem.json")
_METRIC = re.compile(r"\b((?:tandem_|vllm:)[a-zA-Z0-9_:]+)")


def make_console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the table."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


async def show_text(client: tandem.AsyncClient, console: Console) -> None:
    """Prints an answer as it streams."""
    prompt = "Python's for statement iterates over the items of any sequence"
    console.print(f"\n[bold]{prompt}[/bold]", end="")
    async with client.stream(prompt, max_tokens=80, temperature=0.0) as stream:
        async for chunk in stream:
            console.print(chunk.text, end="", markup=False)
    console.print("\n")


def print_runs(console: Console, prompts: Prompts, cases: Sequence[Sequence[int]], runs: Sequence[Run]) -> None:
    """A receipt per prompt."""
    table = Table("prompt", "path", "TTFT ms", "hand-off ms", "recomputed", "KV KiB", "output")
    for token_ids, run in zip(cases, runs, strict=True):
        receipt = run.receipt
        assert receipt is not None
        path = f"{receipt.prefill_replica_id} > {receipt.decode_replica_id}" if receipt.handed_off else receipt.decode_replica_id
        table.add_row(
            str(len(token_ids)),
            path,
            f"{receipt.ttft_s * 1e3:.1f}",
            f"{receipt.handoff_gap_s * 1e3:.1f}" if receipt.handed_off else "",
            str(receipt.decode_recomputed_tokens) if receipt.handed_off else "",
            str(receipt.kv_bytes_shipped // 1024),
            repr(prompts.text(run.token_ids[:12])),
        )
    console.print(table)


def timings(ours: Sequence[Run], plains: Sequence[Run], timed: Sequence[Run]) -> dict[str, object]:
    """Medians in seconds, as the client sees them; the gap at 1,000 tokens is of the timed prompts alone.

    What bounds that gap is `plain_tail_ttft_p50_s`: the plain replica's first token for a prompt as long as the tail that is computed.
    """
    receipts = [run.receipt for run in ours if run.receipt is not None]
    handed_off = [receipt for receipt in receipts if receipt.handed_off]
    return {
        "ttft_p50_s": statistics.median(run.times_s[0] for run in ours),
        "plain_ttft_p50_s": statistics.median(run.times_s[0] for run in plains),
        "ttft_added_p50_s": statistics.median(run.times_s[0] - plain.times_s[0] for run, plain in zip(ours, plains, strict=True)),
        "itl_p50_s": statistics.median(gap for run in ours for gap in run.itl_s),
        "plain_itl_p50_s": statistics.median(gap for run in plains for gap in run.itl_s),
        "handoff_gap_p50_s": statistics.median(receipt.handoff_gap_s for receipt in handed_off) if handed_off else None,
        "handoff_gap_1000_tokens_p50_s": statistics.median(run.receipt.handoff_gap_s for run in timed if run.receipt is not None),
        "timed_prompts": len(ours),
    }


def exactness(
    cases: Sequence[Sequence[int]], ours: Sequence[Run], plains: Sequence[Run], references: Sequence[Sequence[int]]
) -> dict[str, object]:
    """How many answers are the reference's, token for token."""
    receipts = [run.receipt for run in ours if run.receipt is not None]
    return {
        "prompts": len(cases),
        "prompt_tokens": [len(token_ids) for token_ids in cases],
        "token_exact": sum(run.token_ids == list(reference) for run, reference in zip(ours, references, strict=True)),
        "plain_token_exact": sum(run.token_ids == list(reference) for run, reference in zip(plains, references, strict=True)),
        "handed_off": sum(receipt.handed_off for receipt in receipts),
        "kv_bytes_shipped": sum(receipt.kv_bytes_shipped for receipt in receipts),
        "block_size_tokens": EngineConfig().block_size_tokens,
        "decode_recomputed_tokens_max": max((receipt.decode_recomputed_tokens for receipt in receipts if receipt.handed_off), default=0),
    }


async def check_sdk(address: str) -> bool:
    """The blocking client in a thread: text, chat and a typed error."""

    def use() -> bool:
        with tandem.Client(address) as client:
            completion = client.generate("The if statement", max_tokens=8, temperature=0.0)
            chat = client.generate([{"role": "user", "content": "What is Python?"}], max_tokens=8, temperature=0.0)
            try:
                client.generate([2**31 - 1], max_tokens=1)
            except tandem.InvalidRequestError:
                return len(completion.token_ids) == 8 and len(chat.token_ids) > 0 and completion.receipt is not None
        return False

    return await asyncio.to_thread(use)


async def check_http(url: str, model: str) -> bool:
    """The OpenAI endpoint: text, chat and a stream give what the SDK gives, errors are typed. Without any package of OpenAI's."""

    def ask(path: str, body: dict[str, object]) -> bytes:
        request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_HTTP_TIMEOUT_S) as answer:
            return bytes(answer.read())

    def use() -> bool:
        prompt = {"model": model, "prompt": "The if statement", "max_tokens": 8, "temperature": 0}
        text = json.loads(ask("/v1/completions", prompt))["choices"][0]["text"]
        events = ask("/v1/completions", {**prompt, "stream": True}).decode().split("\n\n")
        parts = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
        streamed = "".join(choice["text"] for part in parts for choice in part["choices"])
        chat = {"model": model, "messages": [{"role": "user", "content": "What is Python?"}], "max_tokens": 8, "temperature": 0}
        answer = json.loads(ask("/v1/chat/completions", chat))
        is_typed = False
        try:
            ask("/v1/completions", {**prompt, "temperature": -1})
        except urllib.error.HTTPError as error:
            is_typed = error.code == 400 and json.loads(error.read())["error"]["type"] == "invalid_request_error"
        return is_typed and text == streamed and bool(text) and bool(answer["choices"][0]["message"]["content"])

    return await asyncio.to_thread(use)


async def missing_metrics(url: str) -> list[str]:
    """Metrics that the dashboard asks for and no process of the cluster has, by name; empty where all are there."""
    return await asyncio.to_thread(_missing_metrics, url)


def _missing_metrics(url: str) -> list[str]:
    wanted = set(_METRIC.findall(" ".join(_expressions(json.loads(_DASHBOARD.read_text())))))
    targets = json.loads(_get(f"{url}/sd"))
    pages = []
    for address in (address for group in targets for address in group["targets"]):
        with contextlib.suppress(OSError):  # a replica that is just ending is listed still, as it is to Prometheus
            pages.append(_get(f"http://{address}/metrics"))
    return sorted(wanted - set(_METRIC.findall("\n".join(pages))))


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT_S) as answer:
        return str(answer.read().decode())


def _expressions(node: object) -> list[str]:
    """Every PromQL expression in the dashboard."""
    if isinstance(node, dict):
        own = [node["expr"]] if isinstance(node.get("expr"), str) else []
        return own + [found for value in node.values() for found in _expressions(value)]
    return [found for value in node for found in _expressions(value)] if isinstance(node, list) else []


async def reference_tokens(cases: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens of every prompt by one plain engine in a process of its own."""
    job = {
        "model": str(bundled_model_path()),
        "dtype": "float32",
        "block_size_tokens": EngineConfig().block_size_tokens,
        "requests": [{"token_ids": list(token_ids), "max_tokens": MAX_TOKENS} for token_ids in cases],
    }
    environment = dict(os.environ)
    set_engine_environment(environment)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tandem.engine.reference",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    output, errors = await process.communicate(json.dumps(job).encode())
    lines = [line for line in output.decode().splitlines() if line.startswith("tokens ")]
    if not lines:
        raise RuntimeError(f"the reference engine failed: {errors.decode()[-2000:]}")
    tokens: list[list[int]] = json.loads(lines[0].removeprefix("tokens "))
    return tokens


def verdict(report: dict[str, object]) -> int:
    """Prints the report; 0 where every check holds."""
    console = make_console()
    checks = {
        "every token equals plain vLLM's": report["token_exact"] == report["prompts"],
        "at least 15 requests were handed off": int(str(report["handed_off"])) >= 15,
        "decode recomputed at most one block": int(str(report["decode_recomputed_tokens_max"])) <= int(str(report["block_size_tokens"])),
        "the first token leaves before any KV moves": report["first_token_before_kv"] is True,
        "the SDK works": report["sdk_ok"] is True,
        "HTTP works": report["http_ok"] is True,
        "every metric of the dashboard is served": not report["dashboard_metrics_missing"],
        "a replica was added, answered, and was drained": report["scaled_down_ok"] is True,
        "requests during scaling are exact": report["scaling_token_exact"] == report["scaling_prompts"],
        "nothing is left": report["processes_left"] == 0 and report["shm_files_left"] == 0,
    }
    for name, value in report.items():
        shown = str(value) if not isinstance(value, float) else f"{value:.2f} s" if value >= 1.0 else f"{value * 1e3:.2f} ms"
        console.print(f"  {name:32} {shown}")
    for name, is_held in checks.items():
        console.print(f"  {'ok  ' if is_held else 'FAIL'}  {name}", style="green" if is_held else "bold red")
    return 0 if all(checks.values()) else 1
