"""The requests of a simulation: when they come, how long they are, which blocks their prompts are. Must not know engines or policies."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random

from tandem.domain import BlockHash
from tandem.errors import ConfigError
from tandem.sim.engine_profile import EngineProfile
from tandem.workload import TRACE_BLOCK_TOKENS, TraceRow

_HASH_BYTES = 32
# Of the synthetic workload: sessions of some turns, each prompt the last one, its answer and something new, behind one system prompt.
_TURNS = 5
_SYSTEM_BLOCKS = 1
_FIRST_TOKENS = (1_000, 12_000)
_TURN_TOKENS = (200, 3_000)
_OUTPUT_TOKENS = (20, 600)
_THINKING_S = (5.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request. `session`: the first block that not everybody shares, for policies that want one."""

    number: int
    time_s: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[BlockHash, ...]
    session: str


def synthetic_rows(requests: int, seed: int) -> list[TraceRow]:
    """Multi-turn sessions in the trace's own terms; a function of the seed. Times are a mean of one request a second."""
    rng = Random(seed)
    rows: list[TraceRow] = []
    next_block = _SYSTEM_BLOCKS
    for _ in range(-(-requests // _TURNS)):
        time_s, tokens = rng.uniform(0.0, float(requests)), rng.randint(*_FIRST_TOKENS)
        blocks = list(range(_SYSTEM_BLOCKS))
        for _ in range(_TURNS):
            del blocks[max(_SYSTEM_BLOCKS, len(blocks) - 1) :]  # the last block was not full
            missing = -(-tokens // TRACE_BLOCK_TOKENS) - len(blocks)
            blocks += range(next_block, next_block + missing)
            next_block += max(0, missing)
            output_tokens = rng.randint(*_OUTPUT_TOKENS)
            held = blocks[: -(-tokens // TRACE_BLOCK_TOKENS)]
            rows.append(TraceRow(time_s=time_s, prompt_tokens=tokens, output_tokens=output_tokens, block_ids=tuple(held)))
            time_s += rng.uniform(*_THINKING_S)
            tokens += output_tokens + rng.randint(*_TURN_TOKENS)
    rows.sort(key=lambda row: row.time_s)
    first_s = rows[0].time_s
    return [replace(row, time_s=row.time_s - first_s) for row in rows[:requests]]


def arrivals_of(rows: Sequence[TraceRow], *, profile: EngineProfile, prefill_replicas: int, load: float, seed: int) -> list[Arrival]:
    """The rows at a rate that makes `load` = prefill seconds of all prompts without any cache / (prefill replicas x time).

    Each row comes at a uniformly random moment between its own time and the next row's, because recorded times are grids: that, with the
    step noise and the policy's draws, is what a seed changes. Raises ConfigError where all rows have one time.
    """
    span_s = rows[-1].time_s * len(rows) / max(1, len(rows) - 1)
    if span_s <= 0.0:
        raise ConfigError("the trace's requests all have one time: a load needs at least two times")
    work_s = sum(profile.prefill_s(max(1, row.prompt_tokens)) for row in rows)
    stretch = work_s / (prefill_replicas * load) / span_s
    rng = Random(f"arrivals {seed}")
    ends_s = [row.time_s for row in rows[1:]] + [span_s]
    hashes: dict[int, BlockHash] = {}
    arrivals = []
    for number, (row, end_s) in enumerate(zip(rows, ends_s, strict=True)):
        prompt_tokens = max(1, row.prompt_tokens)
        ids = row.block_ids[: -(-prompt_tokens // TRACE_BLOCK_TOKENS)]
        for block_id in ids:
            if block_id not in hashes:
                hashes[block_id] = BlockHash(blake2b(b"%d" % block_id, digest_size=_HASH_BYTES).digest())
        time_s = (row.time_s + (end_s - row.time_s) * rng.random()) * stretch
        arrivals.append(
            Arrival(
                number=number,
                time_s=time_s,
                prompt_tokens=prompt_tokens,
                output_tokens=max(1, row.output_tokens),
                block_hashes=tuple(hashes[block_id] for block_id in ids),
                session=str(ids[1]) if len(ids) > 1 else "",
            )
        )
    return sorted(arrivals, key=lambda arrival: (arrival.time_s, arrival.number))


def ideal_hit_tokens(arrivals: Sequence[Arrival]) -> list[int]:
    """Of each request, in order: prompt tokens whose blocks an earlier request had, were nothing ever forgotten and all known at once."""
    seen: set[BlockHash] = set()
    hits = []
    for arrival in arrivals:
        matched = next((index for index, one in enumerate(arrival.block_hashes) if one not in seen), len(arrival.block_hashes))
        hits.append(min(matched * TRACE_BLOCK_TOKENS, arrival.prompt_tokens - 1))
        seen.update(arrival.block_hashes)
    return hits
