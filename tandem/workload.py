"""A workload: when requests are sent, how long they are and what their prompts hold. Must not send anything.

Everything is drawn before the run and is a function of the seed: same seed, same requests, whatever the server answers.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Self, TypeVar

import numpy as np

from tandem.errors import ConfigError

# Tokens of one block id of a Mooncake-format trace.
TRACE_BLOCK_TOKENS = 512
# Ids below this are often special (end of sequence, padding); every vocabulary that serves text has ids from here on.
FIRST_PROMPT_TOKEN_ID = 3
MAX_LENGTH_TOKENS = 10_000_000  # beyond every model's context
# First words of seeds, so that no two uses draw the same numbers.
_TIMES, _LENGTHS, _BLOCK, _TAIL = range(4)
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths in tokens, drawn evenly from `low_tokens` to `high_tokens`, both included."""

    low_tokens: int
    high_tokens: int

    @classmethod
    def parse(cls, name: str, text: str) -> Self:
        """`128` for every request alike, or `64:256`; raises ConfigError naming the option `name`."""
        low, _, high = text.partition(":")
        try:
            lengths = cls(low_tokens=int(low), high_tokens=int(high or low))
        except ValueError as error:
            raise ConfigError(f"{name} must be a number of tokens or LOW:HIGH, got {text!r}") from error
        if not 1 <= lengths.low_tokens <= lengths.high_tokens:
            raise ConfigError(f"{name} must be at least 1 token, and LOW not above HIGH, got {text!r}")
        return lengths

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """`count` lengths."""
        return [int(length) for length in rng.integers(self.low_tokens, self.high_tokens, size=count, endpoint=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request to send `send_at_s` seconds after the start. `block_ids`: what its prompt shares with others, block by block."""

    index: int
    send_at_s: float
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """One request of a recorded trace, `time_s` after the trace's first."""

    time_s: float
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]


def poisson_times_s(count: int, rate_rps: float, rng: np.random.Generator) -> list[float]:
    """Times of `count` sends: exponential gaps, scaled so that the last is at count / rate_rps; all 0 where the rate is infinite.

    The scaling makes it a Poisson process given its count: the offered rate is exact for every seed, as in `vllm bench serve`.
    """
    if math.isinf(rate_rps):
        return [0.0] * count
    times = np.cumsum(rng.exponential(size=count))
    return [float(time_s) for time_s in times * (count / rate_rps / times[-1])]


def draw_requests(
    count: int, rate_rps: float, prompt: Lengths, output: Lengths, *, seed: int, is_prefix_shared: bool
) -> list[PlannedRequest]:
    """A synthetic workload in order of time; where the prefix is shared it is block 0 of every prompt. `seed` must not be negative."""
    times_s = poisson_times_s(count, rate_rps, np.random.default_rng([_TIMES, seed]))
    lengths = np.random.default_rng([_LENGTHS, seed])
    prompts, outputs = prompt.draw(count, lengths), output.draw(count, lengths)
    block_ids = (0,) if is_prefix_shared else ()
    return [
        PlannedRequest(index=index, send_at_s=time_s, prompt_tokens=prompts[index], output_tokens=outputs[index], block_ids=block_ids)
        for index, time_s in enumerate(times_s)
    ]


def parse_trace(lines: Iterable[str], name: str, *, must_be_ordered: bool = False) -> list[TraceRow]:
    """The rows of a Mooncake-format trace: JSON lines of timestamp (ms), input_length, output_length and (optional) hash_ids.

    Rows of one timestamp are spread evenly over the time to the next one, because recorded times lie on a coarse grid. Raises
    ConfigError naming the line and the field; for a time before the last row's too where the trace `must_be_ordered`.
    """
    rows: list[TraceRow] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _row(line, f"{name}:{number}")
            if must_be_ordered and rows and row.time_s < rows[-1].time_s:
                raise ConfigError(f"{name}:{number}: timestamp goes backwards, {row.time_s * 1000.0:g} after {rows[-1].time_s * 1000.0:g}")
            rows.append(row)
    rows.sort(key=lambda row: row.time_s)
    if not rows:
        raise ConfigError(f"{name} holds no requests")
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.time_s)]
    starts_s = [group[0].time_s - rows[0].time_s for group in groups]
    gaps_s = [later - earlier for earlier, later in pairwise(starts_s)]
    gaps_s.append(gaps_s[-1] if gaps_s else 0.0)
    return [
        replace(row, time_s=start_s + gap_s * place / len(group))
        for group, start_s, gap_s in zip(groups, starts_s, gaps_s, strict=True)
        for place, row in enumerate(group)
    ]


def _row(line: str, where: str) -> TraceRow:
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("the line is no JSON object")
        row = TraceRow(
            time_s=_field(fields, "timestamp", float) / 1000.0,
            prompt_tokens=_field(fields, "input_length", int),
            output_tokens=_field(fields, "output_length", int),
            block_ids=tuple(_field({"hash_ids": block_id}, "hash_ids", int) for block_id in _block_ids(fields)),
        )
    except KeyError as error:
        raise ConfigError(f"{where}: the field {error} is missing") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: the line nests too deep") from error
    except ValueError as error:
        raise ConfigError(f"{where}: no request with timestamp, input_length and output_length ({error})") from error
    if not math.isfinite(row.time_s):
        raise ConfigError(f"{where}: times must be finite, timestamp is {row.time_s}")
    for field, values in (("input_length", (row.prompt_tokens,)), ("output_length", (row.output_tokens,)), ("hash_ids", row.block_ids)):
        if min(values, default=0) < 0:
            raise ConfigError(f"{where}: {field} must not be negative, got {min(values)}")
        if field != "hash_ids" and max(values) > MAX_LENGTH_TOKENS:
            raise ConfigError(f"{where}: {field} must be at most {MAX_LENGTH_TOKENS}, got {str(max(values))[:40]}")
    return row


def _field(fields: Mapping[str, object], name: str, kind: Callable[[float], _Number]) -> _Number:
    """Raises KeyError, and ValueError naming the field."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {str(value)[:40]!r}")
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{name} must be a whole number, got {value}")
    try:
        return kind(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large, or no number") from error


def _block_ids(fields: Mapping[str, object]) -> list[object]:
    block_ids = fields.get("hash_ids", [])
    if not isinstance(block_ids, list):
        raise ValueError(f"hash_ids must be a list of numbers, got {str(block_ids)[:40]!r}")
    return block_ids


def requests_of_trace(
    rows: Sequence[TraceRow],
    *,
    rate_rps: float | None = None,
    scale: float = 1.0,
    max_requests: int | None = None,
    max_s: float | None = None,
) -> list[PlannedRequest]:
    """The first rows of a trace as requests: at most `max_requests` of them, and those before `max_s`.

    `rate_rps` stretches time so that the taken rows come at that mean rate; None keeps the trace's times. Lengths are multiplied by
    `scale`, and so is the block that a block id stands for (`trace_block_tokens`), so that the same fraction of each prompt is shared.
    """
    taken = rows[:max_requests]
    stretch = 1.0
    if rate_rps is not None and len(taken) > 1:
        span_s = taken[-1].time_s * len(taken) / (len(taken) - 1)
        stretch = len(taken) / rate_rps / span_s if span_s > 0.0 else 0.0
    return [
        PlannedRequest(
            index=index,
            send_at_s=row.time_s * stretch,
            prompt_tokens=max(1, round(row.prompt_tokens * scale)),
            output_tokens=max(1, round(row.output_tokens * scale)),
            block_ids=row.block_ids,
        )
        for index, row in enumerate(taken)
        if max_s is None or row.time_s * stretch < max_s
    ]


def trace_block_tokens(scale: float) -> int:
    """Tokens that one block id of a trace stands for at this scale."""
    return max(1, round(TRACE_BLOCK_TOKENS * scale))


def clip_to_context(requests: Sequence[PlannedRequest], context_tokens: int) -> tuple[list[PlannedRequest], int]:
    """The requests made to fit a model's context, prompts cut at their end first, and how many were cut."""
    clipped: list[PlannedRequest] = []
    for request in requests:
        output_tokens = min(request.output_tokens, context_tokens - 1)
        prompt_tokens = min(request.prompt_tokens, context_tokens - output_tokens)
        clipped.append(replace(request, prompt_tokens=prompt_tokens, output_tokens=output_tokens))
    return clipped, sum(new != old for new, old in zip(clipped, requests, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts as random token ids: equal block ids give equal blocks of `block_tokens`, the rest is each request's own."""

    seed: int
    vocabulary_tokens: int
    block_tokens: int

    def token_ids(self, request: PlannedRequest) -> list[int]:
        """The request's prompt, the same at every call; ids from 3 to the vocabulary's end. O(tokens)."""
        blocks = [self._draw(_BLOCK, block_id, self.block_tokens) for block_id in request.block_ids]
        shared = np.concatenate(blocks)[: request.prompt_tokens] if blocks else np.empty(0, dtype=np.int64)
        tail = self._draw(_TAIL, request.index, request.prompt_tokens - len(shared))
        token_ids: list[int] = np.concatenate((shared, tail)).tolist()
        return token_ids

    def _draw(self, use: int, number: int, count: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        rng = np.random.default_rng([use, self.seed, number])
        return rng.integers(FIRST_PROMPT_TOKEN_ID, self.vocabulary_tokens, size=count)
