"""The simulated engine: all of a replica is real but the model. A step takes the time that a profile says.

Lives on the replica's event loop, without a thread. Must not import vLLM or torch, nor a store: that is handed in.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from tandem.config import EngineConfig
from tandem.domain import BlockHash, FinishReason, Sampling
from tandem.engine.base import MAX_STEP_SAMPLES, EngineLoad, EngineOutput, EngineRequest, KvLoaded, KvTotals
from tandem.engine.model_files import resolve_model
from tandem.engine.resumption import check_resumed
from tandem.engine.simulated_batching import Batching, BatchStep, SimulatedRun
from tandem.engine.simulated_blocks import BlockPool
from tandem.engine.simulated_model import check_simulated, engine_info, read_profile
from tandem.engine.simulated_store import StoredBlocks, StoreSide
from tandem.engine.simulated_tokens import TokenDraws
from tandem.engine.token_text import TokenText, load_tokenizer, whole_words
from tandem.engine_watch import EnginePulse
from tandem.errors import EngineError, InvalidRequestError
from tandem.step_reservoir import StepReservoir
from tandem.step_sample import StepSample

logger = logging.getLogger(__name__)

_TOKEN_SEED = 0  # of every replica: a continuation must draw the same tokens
_GRAIN_S = 2e-3  # of the loop's timers: what a step ends later than this is the machine's doing, and part of the step's time
_EXIT_BROKEN = 70  # as where vLLM's process dies


class BlockHasher(Protocol):
    """The block hashes of routers and stores (`kv_transfer/blocks.py`)."""

    def __call__(
        self, token_ids: Sequence[int], block_size_tokens: int, cache_salt: str = "", parent: BlockHash | None = None
    ) -> list[BlockHash]:
        """Of all full blocks; `parent` continues a chain."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Active:
    """A request while it runs: how its tokens are drawn, and those that nobody has read yet."""

    request: EngineRequest
    run: SimulatedRun
    draws: TokenDraws
    ends: frozenset[int]
    stop_token_ids: frozenset[int]
    new_tokens: int = 0
    unread: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    has_news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self) -> EngineOutput:
        """All that is new."""
        tokens, self.unread = tuple(self.unread), []
        self.has_news.clear()
        return EngineOutput(
            choice_index=0,
            token_ids=tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cached_tokens=self.run.cached_tokens or 0,
        )

    def draw(self, context_tokens: int) -> None:
        """One more token, and the end where it is one."""
        may_end = self.new_tokens >= self.request.sampling.min_tokens
        token = self.draws.draw(frozenset() if may_end else self.ends)
        self.run.token_ids.append(token)
        self.unread.append(token)
        self.new_tokens += 1
        if token in self.ends:
            self.finish_reason = FinishReason.STOP
            self.stop_reason = str(token) if token in self.stop_token_ids else None
        elif self.new_tokens >= self.request.max_new_tokens or len(self.run.token_ids) >= context_tokens:
            self.finish_reason = FinishReason.LENGTH
        self.has_news.set()


class SimulatedEngine:
    """An `Engine`. `store` is None where KV transfer is off. Raises ConfigError."""

    def __init__(self, config: EngineConfig, hasher: BlockHasher, store: StoredBlocks | None) -> None:
        folder = resolve_model(config.model)
        self._hasher = hasher
        self._profile = read_profile(config)
        self.info = engine_info(config, self._profile, folder)
        self._eos_token_id = next(iter(self.info.eos_token_ids), None)
        self._tokenizer = load_tokenizer(folder)
        self._words = whole_words(self._tokenizer)
        self._rng = Random(config.seed)
        self._pool = BlockPool(self.info.kv_blocks)
        self.blocks = self._pool.held
        self._store_side = StoreSide(store, config.block_size_tokens)
        self._batching = Batching(
            self._pool,
            self._store_side,
            block_size_tokens=config.block_size_tokens,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._active: dict[SimulatedRun, _Active] = {}
        self._samples = StepReservoir(MAX_STEP_SAMPLES)
        self._steps = 0
        self._wake = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None

    @property
    def pulse(self) -> EnginePulse:
        """It has no process of its own that could stop."""
        return EnginePulse(pids=(), is_busy=bool(self._active), steps=self._steps)

    def start(self) -> None:
        """Begins to step on the running loop. A bug in a step ends this process, as the death of vLLM's does."""
        self._stepping = asyncio.create_task(self._step_forever(), name="engine steps")
        self._stepping.add_done_callback(_end_where_broken)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Runs a request; closing the iterator aborts it. Tokens that were not read in time come together."""
        active = self._admit(request)
        try:
            while True:
                await active.has_news.wait()
                output = active.take()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._end(active)

    def output_text(self, token_ids: tuple[int, ...], sampling: Sampling) -> TokenText:
        """Text state primed with the prompt's tokens."""
        return TokenText(self._tokenizer, token_ids, sampling)

    async def published(self, run_id: str, timeout_s: float) -> int:
        """Leading prompt blocks of the run in the store, once they are there."""
        return await self._store_side.published(run_id, timeout_s)

    def take_loaded(self, run_id: str) -> KvLoaded | None:
        """What the run loaded from the store."""
        return self._store_side.take_loaded(run_id)

    def forget(self, run_id: str) -> None:
        """Drops what is kept of a run for `published` and `take_loaded`."""
        self._store_side.forget(run_id)

    def load(self) -> EngineLoad:
        """Load now."""
        return EngineLoad(
            running_requests=self._batching.running_requests,
            waiting_requests=self._batching.waiting_requests,
            kv_used_fraction=self._pool.used_fraction,
        )

    def take_steps(self) -> tuple[StepSample, ...]:
        """Steps since the last call."""
        return self._samples.take()

    def kv_totals(self) -> KvTotals:
        """Transfer counts now."""
        return self._store_side.totals()

    async def check_health(self) -> None:
        """Raises EngineError where it does not step."""
        if self._stepping is None or self._stepping.done():
            raise EngineError("the simulated engine does not step")

    def close(self) -> None:
        """Ends the steps and the link to the store."""
        if self._stepping is not None:
            self._stepping.cancel()
        self._store_side.close()

    def _admit(self, request: EngineRequest) -> _Active:
        """Raises InvalidRequestError."""
        sampling, info = request.sampling, self.info
        check_simulated(sampling)
        check_resumed(request, self._eos_token_id)
        if not 0 < len(request.token_ids) < info.context_tokens:
            raise InvalidRequestError("prompt", f"must have from 1 to {info.context_tokens - 1} tokens, got {len(request.token_ids)}")
        hashes = self._hasher(request.token_ids, info.block_size_tokens, request.cache_salt)
        run = SimulatedRun(run_id=request.run_id, token_ids=list(request.token_ids), hashes=hashes, priority=request.priority)
        stop_token_ids = frozenset(sampling.stop_token_ids)
        draws = TokenDraws(
            request.token_ids,
            seed=_TOKEN_SEED if sampling.seed is None else sampling.seed,
            words=self._words,
            eos_token_id=self._eos_token_id,
            eos_fraction=self._profile.eos_fraction,
        )
        ends = stop_token_ids if sampling.ignore_eos or self._eos_token_id is None else stop_token_ids | {self._eos_token_id}
        active = _Active(request=request, run=run, draws=draws, ends=ends, stop_token_ids=stop_token_ids)
        self._store_side.begin(request, hashes)
        self._active[run] = active
        self._batching.add(run)
        self._wake.set()
        return active

    def _end(self, active: _Active) -> None:
        """The run needs no more steps; again is no harm."""
        self._active.pop(active.run, None)
        self._batching.remove(active.run)

    async def _step_forever(self) -> None:
        """Steps follow each other without a gap while there is work, however coarse the loop's timers are."""
        loop = asyncio.get_running_loop()
        due_s = 0.0  # when the last step ended, by its own time
        while True:
            if not self._active:
                self._wake.clear()
                await self._wake.wait()
                due_s = 0.0
            began_s = due_s if loop.time() - due_s < _GRAIN_S else loop.time()
            step = self._batching.schedule()
            due_s = began_s + self._profile.step_s(step.work, self._rng)
            await asyncio.sleep(due_s - loop.time())
            late_s = loop.time() - due_s
            if late_s > _GRAIN_S:
                due_s += late_s
            self._steps += 1
            self._finish(step, due_s - began_s)

    def _finish(self, step: BatchStep, duration_s: float) -> None:
        """Gives the step's runs their tokens, and routers its sample."""
        work = step.work
        if step.shares and not step.loaded_blocks:
            self._samples.add(
                (
                    StepSample(
                        prefill_tokens=work.prefill_tokens,
                        prefill_pairs=work.prefill_pairs,
                        decode_requests=work.decode_requests,
                        kv_tokens=work.kv_tokens,
                        duration_s=duration_s,
                    ),
                )
            )
        ready = self._batching.computed(step)
        for share in step.shares:
            if share.run in self._active:
                self._store_side.computed(share.run)
        for run in ready:
            active = self._active[run]
            active.draw(self.info.context_tokens)
            if active.finish_reason is not None:
                self._end(active)
            else:
                self._extend_hashes(active)

    def _extend_hashes(self, active: _Active) -> None:
        """Of the block that the newest token fills, if it fills one."""
        run, size = active.run, self.info.block_size_tokens
        if len(run.token_ids) // size > len(run.hashes):
            parent = run.hashes[-1] if run.hashes else None
            start = len(run.hashes) * size
            run.hashes += self._hasher(run.token_ids[start:], size, active.request.cache_salt, parent)


def _end_where_broken(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("simulated_engine_broken error=%r", error, exc_info=error)
        os._exit(_EXIT_BROKEN)
