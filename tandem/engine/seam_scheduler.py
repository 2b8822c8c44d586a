"""What a run needs before it is scheduled to go on from another run's output: its grammar where that one's was, its sampler told.

Done where the scheduler takes a request in: once per request whatever is preempted later, and with or without a KV connector.
Has the steps measured too, for the engine core calls the scheduler at a step's begin and end, and tells what the prefix cache holds.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from tandem.engine.block_events import BlockEvents, with_blocks
from tandem.engine.step_meter import StepMeter, with_step
from tandem.engine.takeover import resumed_tokens, take_over
from tandem.parenthood import die_with_parent
from tandem.step_sample import StepSample


class SeamScheduler(Scheduler):
    """vLLM's scheduler with prepared requests and measured steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        die_with_parent()  # in the engine's process: without it an engine outlives its killed replica for ever
        self._meter = StepMeter()
        self._sample: StepSample | None = None  # of the step that is ending
        # By running requests that were ended from outside since the last step but one, which a step may still be computing.
        self._aborted_blocks = deque[list[Sequence[int]]]([[]], maxlen=2)
        super().__init__(*arguments, **options)
        self._block_events = BlockEvents(self.kv_cache_manager.block_pool)

    def add_request(self, request: Request) -> None:
        """Takes a request in."""
        prepare(request, owns_draws=not self.vllm_config.use_v2_model_runner)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Begins a step."""
        began_s = time.perf_counter()
        output = super().schedule(throttle_prefills)
        self._meter.scheduled(output, began_s)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> dict[int, EngineCoreOutputs]:
        """Ends a step; its sample leaves with its stats."""
        self._sample = self._meter.ended(scheduler_output, time.perf_counter())
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        self._aborted_blocks.append([])
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Ends requests from outside; in the midst of a step too, whose loads may turn out to have failed."""
        ids = [request_ids] if isinstance(request_ids, str) else list(self.requests if request_ids is None else request_ids)
        running = [request_id for request_id in ids if (one := self.requests.get(request_id)) and one.status is RequestStatus.RUNNING]
        self._aborted_blocks[-1] += [self.kv_cache_manager.get_block_ids(request_id)[0] for request_id in running]
        return list(super().finish_requests(ids, finished_status))

    def _handle_invalid_blocks(self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]) -> set[str]:
        """What could not be loaded is not left in the prefix cache where its request was aborted meanwhile, which vLLM does not see."""
        for block_ids in (one for ended in self._aborted_blocks for one in ended):
            first = next((place for place, block_id in enumerate(block_ids) if block_id in invalid_block_ids), len(block_ids))
            self.kv_cache_manager.evict_blocks(set(block_ids[first:]))
        return set(super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens))

    def _update_requests_with_invalid_blocks(
        self,
        requests: Iterable[Request],
        invalid_block_ids: set[int],
        num_scheduled_tokens: dict[str, int],
        evict_blocks: bool = True,
    ) -> tuple[set[str], int, set[int]]:
        """Each request computes for itself what could not be loaded, and the prefix cache forgets it and all that follows from it.

        vLLM has one of those that share such a block compute it for all, and has it found in the cache at once: where that one is aborted,
        preempted or has no place in the next step, the others go on with what was in the block before.
        """
        affected, affected_tokens, evicted = set[str](), 0, set[int]()
        for request in requests:
            found = super()._update_requests_with_invalid_blocks([request], invalid_block_ids, num_scheduled_tokens, evict_blocks)
            affected |= found[0]
            affected_tokens += found[1]
            evicted |= found[2]
        self.kv_cache_manager.evict_blocks(evicted)
        return affected, affected_tokens, evicted

    def make_stats(self, *arguments: Any, **options: Any) -> SchedulerStats | None:
        """Stats of the step that is ending."""
        stats = super().make_stats(*arguments, **options)
        if stats is not None and self._sample is not None:
            stats.kv_connector_stats = with_step(stats.kv_connector_stats, self._sample)
            self._sample = None
        if stats is not None and (change := self._block_events.take()):
            stats.kv_connector_stats = with_blocks(stats.kv_connector_stats, change)
        return stats

    def reset_prefix_cache(self, *arguments: Any, **options: Any) -> bool:
        """Forgets all cached blocks, where none is in use."""
        has_reset = bool(super().reset_prefix_cache(*arguments, **options))
        if has_reset:
            self._block_events.was_reset()
        return has_reset


class SeamAsyncScheduler(SeamScheduler, AsyncScheduler):
    """The same for engines that schedule ahead of their tokens."""


def install_scheduler(config: VllmConfig) -> None:
    """Has the engine use ours in place of the one it would take."""
    config.scheduler_config.scheduler_cls = SeamAsyncScheduler if config.scheduler_config.async_scheduling else SeamScheduler


def prepare(request: Request, *, owns_draws: bool) -> None:
    """Changes a new request so that it continues exactly. Under the V2 model runner a draw follows from seed and position anyway."""
    replay_resumed(request)
    if request.sampling_params is not None:
        request.sampling_params = take_over(request.sampling_params, owns_draws=owns_draws)


def replay_resumed(request: Request) -> None:
    """Puts a grammar that has taken the resumed tokens in the place of the one that vLLM's threads compile.

    The scheduler holds the request until that is there, and fails it where a token does not fit.
    """
    structured, resumed = request.structured_output_request, resumed_tokens(request.sampling_params)
    if structured is None or not resumed:
        return
    tokens = list(request.prompt_token_ids or ())[-resumed:]
    compiled = structured._grammar  # its property hides what is still being compiled
    if isinstance(compiled, Future):
        replayed: Future[StructuredOutputGrammar] = Future()
        compiled.add_done_callback(lambda done: _replay_into(replayed, done, request.request_id, tokens))
        structured.grammar = replayed
    elif compiled is not None and not isinstance(compiled, Exception):
        _replay(compiled, request.request_id, tokens)


def _replay_into(
    replayed: "Future[StructuredOutputGrammar]", compiled: "Future[StructuredOutputGrammar]", request_id: str, tokens: list[int]
) -> None:
    try:
        grammar = compiled.result()
        _replay(grammar, request_id, tokens)
    except Exception as error:  # the scheduler fails this request with it, as it does where a grammar does not compile
        replayed.set_exception(error)
    else:
        replayed.set_result(grammar)


def _replay(grammar: StructuredOutputGrammar, request_id: str, tokens: list[int]) -> None:
    """One by one, as the engine itself would have: what comes after the grammar's end is free. Raises ValueError where one does not fit."""
    for position, token in enumerate(tokens):
        if not grammar.accept_tokens(request_id, [token]):
            raise ValueError(f"resumed token {position} does not fit the structured output")
