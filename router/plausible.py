"""Whether what a replica reports can be true. Must not act on it: the core drops what cannot be."""

from collections.abc import Iterable
from math import isfinite

from tandem.domain import EngineInfo, WorkerLoad
from tandem.step_sample import StepSample

_MOST_REQUESTS = 1_000_000  # of one replica: engines take some hundreds at once, and routers have bounds of some thousands
_MOST_OVERBOOKED = 1_000  # times the room for KV: what waits in an engine is counted too
_LONGEST_STEP_S = 3600.0


def is_possible_load(load: WorkerLoad, engine: EngineInfo) -> bool:
    """Whether a replica with that engine can have these totals."""
    room_tokens = max(1, engine.kv_blocks * engine.block_size_tokens)
    most_tokens = _MOST_OVERBOOKED * max(room_tokens, engine.context_tokens)
    return (
        isfinite(load.kv_used_fraction)
        and 0.0 <= load.kv_used_fraction <= 1.0
        and 0 <= load.running_requests <= _MOST_REQUESTS
        and 0 <= load.waiting_requests <= _MOST_REQUESTS
        and 0 <= load.pending_prefill_tokens <= most_tokens
        and 0 <= load.kv_tokens <= most_tokens
    )


def possible_steps(samples: Iterable[StepSample], engine: EngineInfo) -> list[StepSample]:
    """Those that an engine with these bounds can have measured: some work, in some time."""
    return [sample for sample in samples if _is_possible_step(sample, engine)]


def _is_possible_step(sample: StepSample, engine: EngineInfo) -> bool:
    return (
        isfinite(sample.duration_s)
        and 0.0 < sample.duration_s <= _LONGEST_STEP_S
        and 0 <= sample.prefill_tokens <= max(engine.max_num_batched_tokens, engine.context_tokens)
        and 0 <= sample.prefill_pairs <= sample.prefill_tokens * engine.context_tokens
        and 0 <= sample.decode_requests <= engine.max_num_seqs
        and 0 <= sample.kv_tokens <= (sample.decode_requests + 1) * engine.context_tokens
        and sample.prefill_tokens + sample.decode_requests > 0
    )
