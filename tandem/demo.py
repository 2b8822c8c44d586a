"""`make demo`: starts the platform on the bundled model, sends real prompts, checks every token against one plain vLLM engine, stops.

Prints tokens, receipts and KV traffic; writes one JSON object. Exit status 1 where a check fails.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import tandem
from tandem.bare import BareOptions, BarePlatform
from tandem.completion import assemble
from tandem.config import EngineConfig
from tandem.convert import chunk_from_pb, receipt_from_pb, request_to_worker_pb
from tandem.domain import Chunk, ModelId, Plan, PlannedWorker, Receipt, ReplicaId, Request, RequestId, Role, Sampling
from tandem.engine.environment import set_engine_environment
from tandem.engine.model_files import bundled_model_path
from tandem.launch import ReplicaProcess
from tandem.rpc import open_channel, open_stream
from tandem.v1 import common_pb2, inference_pb2

LENGTHS = (5, 9, 17, 31, 32, 33, 63, 64, 65, 96, 97, 128, 200, 255, 256, 257, 384, 500, 640, 800, 1000, 1024, 1025, 1250, 1500)
MAX_TOKENS = 48
_TIMED_REPEATS = 15
_TIMED_TOKENS = 1000
_HELD_BACK_S = 0.5
_HELD_BACK_REPEATS = 7


@dataclass(slots=True)
class Run:
    """One streamed answer: tokens, text, when each message came (s after sending), and the receipt."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    receipt: Receipt | None = None

    def take(self, chunk: Chunk, started_s: float) -> None:
        """Adds a chunk."""
        if chunk.token_ids:
            self.times_s.append(time.monotonic() - started_s)
        self.token_ids += chunk.token_ids
        self.text += chunk.text

    @property
    def itl_s(self) -> list[float]:
        """Gaps between messages after the second token: decode alone, without the hand-off."""
        return [later - earlier for earlier, later in zip(self.times_s[1:], self.times_s[2:], strict=False)]


async def run_through_sdk(client: tandem.AsyncClient, token_ids: Sequence[int], max_tokens: int) -> Run:
    """One greedy request through the router."""
    run, started_s = Run(), time.monotonic()
    async with client.stream(list(token_ids), max_tokens=max_tokens, temperature=0.0) as stream:
        async for chunk in stream:
            run.take(chunk, started_s)
        run.receipt = stream.receipt
    return run


class DirectCaller:
    """Calls one replica over one gRPC hop, without a router: what everything else is compared with."""

    def __init__(self, replica: ReplicaProcess, prefill: Sequence[ReplicaProcess] = ()) -> None:
        self._plan = Plan(plan_id="direct", decode=_planned(replica), prefill=tuple(map(_planned, prefill)))
        self._channel = open_channel(replica.address)
        self._number = 0

    async def run(self, token_ids: Sequence[int], max_tokens: int) -> Run:
        """One greedy request."""
        run, started_s = Run(), time.monotonic()
        async for chunk, receipt in self._stream(token_ids, Sampling(temperature=0.0, max_tokens=max_tokens)):
            if chunk is not None:
                run.take(chunk, started_s)
            run.receipt = receipt
        return run

    async def complete(self, token_ids: Sequence[int], sampling: Sampling) -> tandem.Completion:
        """One request with any sampling."""
        chunks: list[Chunk] = []
        final: Receipt | None = None
        async for chunk, receipt in self._stream(token_ids, sampling):
            if chunk is not None:
                chunks.append(chunk)
            final = receipt
        return assemble(chunks, num_choices=sampling.n, receipt=final)

    async def _stream(self, token_ids: Sequence[int], sampling: Sampling) -> AsyncIterator[tuple[Chunk | None, Receipt | None]]:
        """The chunks, each with no receipt, then the receipt."""
        self._number += 1
        request = Request(
            request_id=RequestId(f"direct-{id(self)}-{self._number}"),
            model=ModelId("bundled"),
            prompt_token_ids=tuple(token_ids),
            sampling=sampling,
        )
        message = request_to_worker_pb(request, self._plan, 0, self._plan.decode.incarnation)
        async with open_stream(self._channel, "tandem.v1.Worker/Generate", message, timeout_s=60.0) as stream:
            async for payload in stream:
                yield chunk_from_pb(inference_pb2.GenerateResponse.FromString(payload)), None
            receipt = await stream.receipt()
        yield None, None if receipt is None else receipt_from_pb(common_pb2.Receipt.FromString(receipt))

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close(None)


def _planned(replica: ReplicaProcess) -> PlannedWorker:
    return PlannedWorker(replica_id=ReplicaId(replica.config.replica_id), incarnation=replica.config.incarnation, address=replica.address)


class Prompts:
    """Prompts of exact lengths cut from the model's own field; no two share a prefix."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(bundled_model_path() / "tokenizer.json"))
        self._ids = self._tokenizer.encode((bundled_model_path() / "sample.txt").read_text()).ids
        self._offset = 0

    def next(self, length: int) -> list[int]:
        """The next `length` tokens of the sample text, round and round."""
        self._offset = (self._offset + 37) % len(self._ids)
        doubled = self._ids[self._offset :] + self._ids[: self._offset]
        return (doubled * (1 + length // len(doubled)))[:length]

    def text(self, token_ids: Sequence[int]) -> str:
        """For people."""
        return str(self._tokenizer.decode(list(token_ids)))


async def run_demo() -> dict[str, object]:
    """Runs the demonstration; returns the report."""
    console = make_console()
    prompts = Prompts()
    begun_s = time.monotonic()

    def progress(line: str) -> None:
        console.print(f"{time.monotonic() - begun_s:6.1f} s  {line}", style="dim")

    platform = BarePlatform(BareOptions())
    try:
        await platform.start()
        async with tandem.AsyncClient(platform.router_address) as client:
            await run_through_sdk(client, prompts.next(40), 1)
            ready_s = time.monotonic() - begun_s
            progress(f"first token {ready_s:.1f} s after the start")
            report: dict[str, object] = {"schema": "tandem.demo/1", "ready_s": ready_s}
            await show_text(client, console)
            cases = [prompts.next(length) for length in LENGTHS]
            progress(f"{len(cases)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens, the same on a plain replica, interleaved")
            plain_replica = await platform.add_replica(Role.DECODE, "plain", is_kv_transfer_on=False)
            plain = DirectCaller(plain_replica)
            await plain.run(prompts.next(40), 4)
            ours, plains = await interleave(client, plain, cases, MAX_TOKENS)
            print_runs(console, prompts, cases, ours)
            progress(f"{_TIMED_REPEATS} prompts of {_TIMED_TOKENS} tokens for the timings")
            timed = [prompts.next(_TIMED_TOKENS) for _ in range(_TIMED_REPEATS)]
            timed_ours, timed_plains = await interleave(client, plain, timed, MAX_TOKENS)
            report |= timings(ours + timed_ours, plains + timed_plains, timed_ours)
            tails = [await plain.run(prompts.next(_TIMED_TOKENS % EngineConfig().block_size_tokens + 1), 1) for _ in timed]
            report["plain_tail_ttft_p50_s"] = statistics.median(run.times_s[0] for run in tails)
            report["sdk_ok"] = await check_sdk(platform.router_address)
            progress(f"a second pair whose transfers are held back {_HELD_BACK_S} s")
            report |= await hold_back(platform, prompts)
            await plain.close()
    finally:
        progress("stopping")
        await platform.stop()
    progress("one plain vLLM engine computes the same prompts")
    references = await reference_tokens(cases)
    report |= exactness(cases, ours, plains, references)
    return report


def make_console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the table."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


async def interleave(
    client: tandem.AsyncClient, plain: DirectCaller, cases: Sequence[Sequence[int]], max_tokens: int
) -> tuple[list[Run], list[Run]]:
    """Each prompt through the platform and on the plain replica, one at a time, in turn."""
    ours, plains = [], []
    for number, token_ids in enumerate(cases):
        if number % 2:
            plains.append(await plain.run(token_ids, max_tokens))
        ours.append(await run_through_sdk(client, token_ids, max_tokens))
        if not number % 2:
            plains.append(await plain.run(token_ids, max_tokens))
    return ours, plains


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
        "handoff_gap_p50_s": statistics.median(receipt.handoff_gap_s for receipt in handed_off),
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
        "decode_recomputed_tokens_max": max(receipt.decode_recomputed_tokens for receipt in receipts if receipt.handed_off),
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


async def hold_back(platform: BarePlatform, prompts: Prompts) -> dict[str, object]:
    """Whether the first token leaves before any KV has moved: TTFT of a pair whose transfers wait, against the ordinary pair."""
    held_prefill = await platform.add_replica(Role.PREFILL, "held-prefill", faults=f"kv_publish.delay_s={_HELD_BACK_S}")
    usual = DirectCaller(platform.replicas["decode-0"], [platform.replicas["prefill-0"]])
    held = DirectCaller(platform.replicas["decode-0"], [held_prefill])
    await held.run(prompts.next(320), 4)
    usual_runs, held_runs = [], []
    for _ in range(_HELD_BACK_REPEATS):
        usual_runs.append(await usual.run(prompts.next(320), 4))
        held_runs.append(await held.run(prompts.next(320), 4))
    await usual.close()
    await held.close()
    usual_s = statistics.median(run.times_s[0] for run in usual_runs)
    held_s = statistics.median(run.times_s[0] for run in held_runs)
    gap_s = min(run.times_s[1] - run.times_s[0] for run in held_runs)
    return {
        "first_token_before_kv": held_s < usual_s + _HELD_BACK_S / 2 and gap_s >= _HELD_BACK_S,
        "held_back_ttft_p50_s": held_s,
        "not_held_back_ttft_p50_s": usual_s,
        "held_back_gap_min_s": gap_s,
    }


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
    }
    for name, value in report.items():
        shown = f"{value * 1e3:.2f} ms" if isinstance(value, float) and name != "ready_s" else str(value)
        console.print(f"  {name:32} {shown}")
    for name, is_held in checks.items():
        console.print(f"  {'ok  ' if is_held else 'FAIL'}  {name}", style="green" if is_held else "bold red")
    return 0 if all(checks.values()) else 1


def main() -> int:
    """Runs, writes the report, judges it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tandem.demo")
    parser.add_argument("--json", type=Path, default=Path("build/demo.json"))
    path = parser.parse_args().json
    report = asyncio.run(run_demo())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    status = verdict(report)
    print(f"report: {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
