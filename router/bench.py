"""`python -m router.bench`: what a decision and the prefix index cost at 1,000 replicas, and how long hashing and tokenising take.

Must not start processes or use the network. Figures are of the machine it runs on.
"""

import argparse
import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kv_transfer.manifest import hash_in_slices
from router.block_probe_library import load_probe
from router.decision_bench import DecisionTimes, measure_decisions
from router.prefix_index import Holder, PrefixIndex
from router.tokenizer import PromptTokenizer
from tandem.domain import BlockHash, ReplicaId
from tandem.engine.model_files import bundled_model_path
from tandem.short_hash import ShortHashes, short_hashes

SCHEMA = "tandem.router_bench.v1"
_NONE: ShortHashes = short_hashes([])
_MESSAGE_BLOCKS = 64  # what a busy replica stores between two messages
_SHARED_CHAINS = 16
_HOLDERS_PER_CHAIN = 40
_LONG_PROMPT_TOKENS = 131_072
_BLOCK_TOKENS = 32

Row = dict[str, object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m router.bench", description="Measures the router's own work.")
    parser.add_argument("--replicas", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--indexed-blocks", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--prompt-blocks", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--decisions", type=int, default=2000, help="at each number of replicas (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=500, help="of each figure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the report")
    options = parser.parse_args(arguments)
    rows = measure_index(options.replicas, options.indexed_blocks, options.prompt_blocks, options.rounds)
    decisions = [measure_decisions(count, options.prompt_blocks, options.decisions) for count in _scales(options.replicas)]
    rows += [_decision_row(one) for one in decisions]
    hashing, tokenising = measure_hashing(_LONG_PROMPT_TOKENS), measure_tokenising(_LONG_PROMPT_TOKENS)
    rows += [hashing.row(), tokenising.row()]
    for row in rows:
        print(f"{row['name']:<40} {row['text']}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        conditions = {"replicas": options.replicas, "indexed_blocks": options.indexed_blocks, "prompt_blocks": options.prompt_blocks}
        most = decisions[-1]
        report = {
            "schema": SCHEMA,
            "conditions": conditions,
            "decision_p50_us": 1e6 * most.p50_s,
            "decision_p99_us": 1e6 * most.p99_s,
            "decisions_per_s": most.decisions_per_s,
            "requests_per_s": most.requests_per_s,
            "hash_us": 1e6 * hashing.took_s,
            "tokenise_us": 1e6 * tokenising.took_s,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure_index(replicas: int, indexed_blocks: int, prompt_blocks: int, rounds: int) -> list[Row]:
    """Memory, matches of prompts that are known whole, in part and not at all, and updates."""
    rng = np.random.default_rng(1)
    holders: list[Holder] = [(ReplicaId(f"replica-{number}"), 1) for number in range(replicas)]
    index = PrefixIndex(indexed_blocks * 5 // 4, load_probe())
    chains = [_chain(rng, prompt_blocks) for _ in range(_SHARED_CHAINS)]
    own = rng.integers(0, 2**64, max(0, indexed_blocks - len(chains) * prompt_blocks), np.uint64)
    resident_bytes = _resident_bytes()
    for number, chain in enumerate(chains):
        for holder in rng.choice(replicas, min(replicas, _HOLDERS_PER_CHAIN), replace=False):
            known = prompt_blocks if number % 2 else int(rng.integers(1, prompt_blocks + 1))
            index.record(chain[:known], holders[holder])
    for start in range(0, len(own), _MESSAGE_BLOCKS):
        index.apply(holders[start // _MESSAGE_BLOCKS % replicas], own[start : start + _MESSAGE_BLOCKS], _NONE)
    used_bytes = _resident_bytes() - resident_bytes
    everybody = _chain(rng, prompt_blocks)
    for holder_of_all in holders:
        index.record(everybody, holder_of_all)
    unknown = [_chain(rng, prompt_blocks) for _ in range(_SHARED_CHAINS)]
    rows: list[Row] = [
        {
            "name": "memory",
            "kind": "ours",
            "blocks": len(index),
            "table_bytes_per_million_blocks": 1e6 * index.num_bytes / len(index),
            "resident_bytes_per_million_blocks": 1e6 * used_bytes / len(index),
            "holder_sets": index.num_sets,
            "text": f"{used_bytes / len(index):.1f} bytes a block, {len(index)} blocks, {index.num_sets} sets of holders",
        },
        _timed("match, every block known to 40", rounds, lambda number: index.match(chains[number % _SHARED_CHAINS | 1])),
        _timed("match, known to 40 as far as each goes", rounds, lambda number: index.match(chains[number % _SHARED_CHAINS & ~1])),
        _timed("match, every block known to all", rounds, lambda number: index.match(everybody)),
        _timed("match, nothing known", rounds, lambda number: index.match(unknown[number % _SHARED_CHAINS])),
    ]
    for blocks in (1, 8, 64, 512):
        fresh = rng.integers(0, 2**64, (rounds, blocks), np.uint64)
        rows.append(_timed_update("store", blocks, rounds, lambda number, new=fresh: index.apply(holders[0], new[number], _NONE)))  # type: ignore[misc]
        rows.append(_timed_update("remove", blocks, rounds, lambda number, new=fresh: index.apply(holders[0], _NONE, new[number])))  # type: ignore[misc]
    rows.append(_timed("drop and add a replica", min(rounds, 100), lambda number: _replace(index, holders[number % replicas])))
    return rows


def measure_hashing(prompt_tokens: int) -> "LongWork":
    """A prompt's block hashes, in slices between which other tasks have their turn."""
    token_ids = np.random.default_rng(2).integers(0, 128_000, prompt_tokens).tolist()
    return _measure_beside(f"hash a prompt of {prompt_tokens} tokens", lambda: hash_in_slices(token_ids, _BLOCK_TOKENS, ""))


def measure_tokenising(prompt_tokens: int) -> "LongWork":
    """The token ids of a text by the bundled tokenizer, in a thread. The bundled sample over and over, so that words come again."""
    folder = bundled_model_path()
    cutter = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = cutter.decode(list(islice(cycle(cutter.encode((folder / "sample.txt").read_text()).ids), prompt_tokens)))
    tokenizer = PromptTokenizer.load(str(folder))  # another one, which has cached no word yet
    return _measure_beside(f"tokenise a prompt of {prompt_tokens} tokens", lambda: tokenizer.encode_text(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class LongWork:
    """Work beside which another task takes turns: how long all of it took, and how long the other one waited for a turn."""

    name: str
    took_s: float
    gaps_s: Sequence[float]

    def row(self) -> Row:
        """For the report."""
        p50_s, p99_s, max_s = (float(np.quantile(self.gaps_s, quantile)) for quantile in (0.5, 0.99, 1.0))
        waits = f"p50 {1e3 * p50_s:.2f}, p99 {1e3 * p99_s:.2f}, at most {1e3 * max_s:.2f} ms"
        text = f"{1e3 * self.took_s:.1f} ms in all; others wait {waits}"
        return {"name": self.name, "kind": "ours", "total_s": self.took_s, "p50_s": p50_s, "p99_s": p99_s, "max_s": max_s, "text": text}


def _measure_beside(name: str, work: Callable[[], Awaitable[object]]) -> LongWork:
    gaps_s = list[float]()

    async def turn() -> None:
        while True:
            began_s = time.perf_counter()
            await asyncio.sleep(0)
            gaps_s.append(time.perf_counter() - began_s)

    async def work_beside() -> float:
        turning = asyncio.create_task(turn())
        began_s = time.perf_counter()
        await work()
        took_s = time.perf_counter() - began_s
        turning.cancel()
        return took_s

    return LongWork(name=name, took_s=asyncio.run(work_beside()), gaps_s=gaps_s)


def _scales(replicas: int) -> list[int]:
    """Numbers of replicas up to this one, to see how decisions grow."""
    return sorted({*(count for count in (16, 64, 128, 256) if count < replicas), replicas})


def _decision_row(times: DecisionTimes) -> Row:
    rates = f"{times.decisions_per_s:.0f} a second, {times.requests_per_s:.0f} requests/s to their end"
    text = f"p50 {1e6 * times.p50_s:7.1f}  p99 {1e6 * times.p99_s:7.1f} us, {rates}"
    return {
        "name": f"decision at {times.replicas} replicas",
        "kind": "ours",
        **asdict(times),
        "decisions_per_s": times.decisions_per_s,
        "requests_per_s": times.requests_per_s,
        "text": text,
    }


def _replace(index: PrefixIndex, holder: Holder) -> None:
    index.drop(holder)
    index.apply(holder, np.ones(1, np.uint64), _NONE)


def _chain(rng: np.random.Generator, blocks: int) -> list[BlockHash]:
    return [BlockHash(rng.bytes(32)) for _ in range(blocks)]


def _timed(name: str, rounds: int, run: Callable[[int], object]) -> Row:
    """Seconds a call: the least, the median and the 99th percentile."""
    times_s = np.empty(rounds)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            began_s = time.perf_counter()
            run(number)
            times_s[number] = time.perf_counter() - began_s
    finally:
        gc.enable()
    least_s, p50_s, p99_s = (float(value) for value in (times_s.min(), np.quantile(times_s, 0.5), np.quantile(times_s, 0.99)))
    text = f"min {1e6 * least_s:7.1f}  p50 {1e6 * p50_s:7.1f}  p99 {1e6 * p99_s:7.1f} us"
    return {"name": name, "kind": "ours", "min_s": least_s, "p50_s": p50_s, "p99_s": p99_s, "text": text}


def _timed_update(verb: str, blocks: int, rounds: int, run: Callable[[int], object]) -> Row:
    row = _timed(f"{verb} {blocks} blocks of one replica", rounds, run)
    return {**row, "blocks": blocks}


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    sys.exit(main())
