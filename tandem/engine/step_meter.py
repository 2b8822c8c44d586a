"""Measures each step inside vLLM's engine core: what it computed, and its own time.

Knows of vLLM's scheduler output only the fields named here, and imports nothing of it. Costs a few microseconds a step.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Protocol

from tandem.step_sample import StepSample

STEP_STATS = "tandem_step"  # the key under which a sample travels in SchedulerStats.kv_connector_stats
_FIELDS = tuple(field.name for field in fields(StepSample))
_MAX_OPEN_STEPS = 16  # scheduled and not ended: two with asynchronous scheduling, one without


class NewRequest(Protocol):
    """A request in its first step."""

    @property
    def req_id(self) -> str:
        """Its id."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV was there before the step: from the engine's own cache or from the store."""


class KnownRequests(Protocol):
    """Requests of earlier steps, one entry of each list a request."""

    @property
    def req_ids(self) -> Sequence[str]:
        """Their ids."""

    @property
    def num_computed_tokens(self) -> Sequence[int]:
        """Tokens whose KV was there before the step."""

    @property
    def num_output_tokens(self) -> Sequence[int]:
        """Output tokens so far; 0 while the prompt is being computed."""


class ScheduledStep(Protocol):
    """vLLM's SchedulerOutput as far as it counts here."""

    @property
    def scheduled_new_reqs(self) -> Sequence[NewRequest]:
        """Requests in their first step."""

    @property
    def scheduled_cached_reqs(self) -> KnownRequests:
        """All others."""

    @property
    def num_scheduled_tokens(self) -> Mapping[str, int]:
        """Tokens that the step computes of each request."""

    @property
    def total_num_scheduled_tokens(self) -> int:
        """Their sum."""

    @property
    def has_sync_kv_loads(self) -> bool:
        """Whether the step waits for blocks of the store."""


class StepMeter:
    """Call `scheduled` and `ended` around each step, in the order of the steps."""

    def __init__(self) -> None:
        self._open: deque[tuple[ScheduledStep, float]] = deque(maxlen=_MAX_OPEN_STEPS)
        self._ended_s = 0.0

    def scheduled(self, step: ScheduledStep, began_s: float) -> None:
        """The engine began to schedule this step at `began_s`."""
        self._open.append((step, began_s))

    def ended(self, step: ScheduledStep, now_s: float) -> StepSample | None:
        """The step's tokens are there. None for a step that computed nothing, or whose time is partly the store's.

        With asynchronous scheduling a step is scheduled while the one before it runs, so its own time begins when that one has ended.
        """
        began_s = now_s
        while self._open:
            opened, opened_s = self._open.popleft()
            if opened is step:
                began_s = max(opened_s, self._ended_s)
                break
        self._ended_s = now_s
        if not step.total_num_scheduled_tokens or step.has_sync_kv_loads or began_s >= now_s:
            return None
        return _sample(step, now_s - began_s)


def _sample(step: ScheduledStep, duration_s: float) -> StepSample:
    """A request that computes one token and has output already is a decode request; a preempted one computes its tokens as a prompt."""
    known, counts = step.scheduled_cached_reqs, step.num_scheduled_tokens
    computed, outputs = known.num_computed_tokens, known.num_output_tokens
    if step.total_num_scheduled_tokens == len(outputs) and all(outputs):  # the common step, without a loop
        requests = len(outputs)
        return StepSample(
            prefill_tokens=0, prefill_pairs=0, decode_requests=requests, kv_tokens=sum(computed) + requests, duration_s=duration_s
        )
    prompts = [(counts[new.req_id], new.num_computed_tokens) for new in step.scheduled_new_reqs]
    decode_requests = kv_tokens = 0
    for request_id, there, output_tokens in zip(known.req_ids, computed, outputs, strict=True):
        tokens = counts[request_id]
        if tokens == 1 and output_tokens:
            decode_requests += 1
            kv_tokens += there + 1
        else:
            prompts.append((tokens, there))
    return StepSample(
        prefill_tokens=sum(tokens for tokens, _ in prompts),
        prefill_pairs=sum(tokens * there + tokens * tokens // 2 for tokens, there in prompts),
        decode_requests=decode_requests,
        kv_tokens=kv_tokens,
        duration_s=duration_s,
    )


def with_step(stats: dict[str, object] | None, sample: StepSample) -> dict[str, object]:
    """What SchedulerStats.kv_connector_stats is to hold; `take_step` takes it out again."""
    values = {name: getattr(sample, name) for name in _FIELDS}  # asdict takes ten times as long
    return {**(stats or {}), STEP_STATS: values}


def take_step(stats: dict[str, object] | None) -> tuple[StepSample | None, dict[str, object] | None]:
    """The sample that came with a step's stats, and the stats without it: vLLM's own loggers are to see what is theirs."""
    if stats is None or STEP_STATS not in stats:
        return None, stats
    others = {key: value for key, value in stats.items() if key != STEP_STATS}
    values = stats[STEP_STATS]
    assert isinstance(values, dict)
    return StepSample(**values), others or None
