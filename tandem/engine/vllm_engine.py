"""vLLM's AsyncLLM as an `Engine`. Build it before an event loop or gRPC runs; on CPU its core is forked from this process.

Must not be imported where vLLM is not installed.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.model_executor.models import ModelRegistry
from vllm.outputs import CompletionOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from tandem.config import EngineConfig
from tandem.domain import EngineInfo, FinishReason, Logprobs, Sampling, TokenLogprob
from tandem.engine.base import MAX_STEP_SAMPLES, EngineLoad, EngineOutput, EngineRequest, KvLink, KvLoaded, KvTotals
from tandem.engine.block_events import take_blocks
from tandem.engine.model_files import digest_model, resolve_model
from tandem.engine.output_text import VllmOutputText
from tandem.engine.resumption import check_resumed
from tandem.engine.seam_sampler import install_sampler
from tandem.engine.seam_scheduler import install_scheduler
from tandem.engine.step_meter import take_step
from tandem.engine.vllm_params import last_line, to_sampling_params
from tandem.engine_watch import EnginePulse
from tandem.errors import ConfigError, EngineError, InvalidRequestError, Reason, TandemError
from tandem.held_blocks import HeldBlocks
from tandem.step_reservoir import StepReservoir
from tandem.step_sample import StepSample

_SHUTDOWN_S = 5.0


def namespace_parts(config: EngineConfig) -> dict[str, str | int]:
    """All that decides a KV block's bytes besides its tokens, for `make_namespace`. Reads the model's files."""
    return {
        "model": digest_model(resolve_model(config.model)),
        "dtype": _dtype(config),
        "kv_cache_dtype": "auto",
        "block_size_tokens": config.block_size_tokens,
        "layout": "layer,kv_head,token,channel",
        "tensor_parallel": "0 of 1",
        "engine": f"vllm {vllm.__version__}",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _dtype(config: EngineConfig) -> str:
    if config.dtype == "auto" and not torch.cuda.is_available():
        return "float32"
    return config.dtype


class VllmEngine:
    """One AsyncLLM. Raises ConfigError where vLLM refuses the model or the settings."""

    def __init__(self, config: EngineConfig, link: KvLink | None) -> None:
        self._link = link
        self._is_closed = False
        self._read_choices = 0
        self._stats = _LatestStats()
        self.blocks = self._stats.blocks
        is_cpu = not torch.cuda.is_available()
        folder = resolve_model(config.model)
        if is_cpu:
            _register_in_process(folder)
        transfer = None
        if link is not None:
            name, module, settings = link.connector()
            transfer = KVTransferConfig(
                kv_connector=name,
                kv_connector_module_path=module,
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=settings,
            )
        arguments = AsyncEngineArgs(
            model=str(folder),
            dtype=_dtype(config),
            block_size=config.block_size_tokens,
            max_model_len=config.context_tokens,
            kv_cache_memory_bytes=config.kv_cache_bytes,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=True,
            prefix_caching_hash_algo="sha256_cbor",
            scheduling_policy="priority",
            enforce_eager=is_cpu,
            distributed_executor_backend="uni",
            seed=config.seed,
            kv_transfer_config=transfer,
            enable_log_requests=False,
            generation_config="vllm",
        )
        try:
            vllm_config = arguments.create_engine_config()
            install_sampler(vllm_config)
            install_scheduler(vllm_config)
            if is_cpu:
                # create_engine_config sets "spawn" on CPU; a fork of this process, which has imported all, is ready in half a second.
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            self._llm = AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[lambda *_: self._stats])
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"vLLM cannot serve {config.model}: {last_line(error)}", reason=Reason.START_FAILED) from error
        self._processes = multiprocessing.active_children()
        cache = vllm_config.cache_config
        model = vllm_config.model_config
        eos = model.hf_config.eos_token_id
        num_blocks = cache.num_gpu_blocks or 0
        self.info = EngineInfo(
            block_size_tokens=cache.block_size,
            context_tokens=model.max_model_len,
            vocabulary_tokens=model.get_vocab_size(),
            kv_blocks=num_blocks,
            kv_block_bytes=config.kv_cache_bytes // num_blocks if num_blocks else 0,
            dtype=str(model.dtype).removeprefix("torch."),
            engine="vllm",
            engine_version=vllm.__version__,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            hardware="cpu" if is_cpu else torch.cuda.get_device_name(),
        )
        self._tokenizer = self._llm.get_tokenizer()

    @property
    def pulse(self) -> EnginePulse:
        """Its processes, whether requests run, and the steps so far."""
        pids = tuple(process.pid for process in self._processes if process.pid is not None)
        return EnginePulse(pids=pids, is_busy=self._llm.get_num_unfinished_requests() > 0, steps=self._stats.steps)

    def start(self) -> None:
        """Attaches to the running event loop, and ends this process at once when the engine's process dies."""
        if self._link is not None:
            self._link.listen()
        loop = asyncio.get_running_loop()
        for process in self._processes:
            if process.pid is not None:
                # Without it the replica would live on and fail each request (reference: platform, section 1).
                loop.add_reader(os.pidfd_open(process.pid), os._exit, 70)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Runs a request; closing the iterator aborts it."""
        check_resumed(request, self._tokenizer.eos_token_id if self._tokenizer is not None else None)
        kv_params = None
        if self._link is not None:
            kv_params = self._link.run_params(
                request.run_id, load=request.load_kv, publish=request.publish_kv, counts_use=request.counts_use
            )
        params = to_sampling_params(request, kv_params)
        prompt = tokens_input(list(request.token_ids), cache_salt=request.cache_salt or None)
        run = self._llm.generate(prompt, params, request.run_id, priority=request.priority)
        has_tokens = False
        self._read_choices += request.sampling.n
        try:
            async with contextlib.aclosing(run) as outputs:
                async for output in outputs:
                    for choice in output.outputs:
                        if choice.finish_reason == "error":
                            raise _given_up(request, has_tokens=has_tokens)
                        has_tokens = has_tokens or bool(choice.token_ids)
                        yield _to_output(choice, output.num_cached_tokens or 0, request.sampling.logprobs)
        except EngineDeadError as error:
            raise EngineError("the engine died") from error
        except EngineGenerateError as error:
            raise EngineError(f"the engine failed this request: {error.__cause__ or error}") from error
        except (VLLMClientError, ValueError) as error:
            raise InvalidRequestError("request", f"refused by the engine: {last_line(error)}") from error
        finally:
            self._read_choices -= request.sampling.n

    def forget(self, run_id: str) -> None:
        """Drops what is kept of a run for `published` and `take_loaded`."""
        if self._link is not None:
            self._link.forget(run_id)

    def output_text(self, token_ids: tuple[int, ...], sampling: Sampling) -> VllmOutputText:
        """Text state primed with the prompt's tokens."""
        return VllmOutputText(self._tokenizer, token_ids, sampling)

    async def published(self, run_id: str, timeout_s: float) -> int:
        """Leading prompt blocks of the run in the store, once they are there."""
        return 0 if self._link is None else await self._link.published(run_id, timeout_s)

    def take_loaded(self, run_id: str) -> KvLoaded | None:
        """What the run loaded from the store."""
        return None if self._link is None else self._link.take_loaded(run_id)

    def load(self) -> EngineLoad:
        """Load as of the last step; an engine without requests is idle whatever its last step said."""
        unfinished = self._llm.get_num_unfinished_requests()
        if unfinished == 0:
            return EngineLoad(running_requests=0, waiting_requests=0, kv_used_fraction=0.0)
        return replace(self._stats.load, unowned_requests=max(0, unfinished - self._read_choices))

    def take_steps(self) -> tuple[StepSample, ...]:
        """Steps measured since the last call."""
        return self._stats.samples.take()

    def kv_totals(self) -> KvTotals:
        """Transfer counts now."""
        return KvTotals() if self._link is None else self._link.totals()

    async def check_health(self) -> None:
        """Raises EngineError where the engine is dead."""
        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise EngineError("the engine died") from error

    def close(self) -> None:
        """Ends the engine and its processes."""
        if self._is_closed:
            return
        self._is_closed = True
        self._llm.shutdown(timeout=_SHUTDOWN_S)
        del self._llm  # its __del__ fails once the interpreter is going down
        if self._link is not None:
            self._link.close()


def _register_in_process(folder: Path) -> None:
    """Loads the model's class here: otherwise vLLM inspects it in a process of its own, which imports vLLM anew, on a user's first start.

    vLLM does that to keep CUDA out of a process that will fork; on CPU nothing is gained by it.
    """
    for architecture in json.loads((folder / "config.json").read_text()).get("architectures") or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models.pop(architecture).load_model_cls())


class _LatestStats(StatLoggerBase):
    """Keeps the last step's scheduler counts, samples, and the cached blocks. vLLM calls `record` once a step, before its own loggers'."""

    def __init__(self) -> None:
        self.load = EngineLoad(running_requests=0, waiting_requests=0, kv_used_fraction=0.0)
        self.steps = 0
        self.samples = StepReservoir(MAX_STEP_SAMPLES)
        self.blocks = HeldBlocks()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        self.steps += 1
        if scheduler_stats is not None:
            self.load = EngineLoad(
                running_requests=scheduler_stats.num_running_reqs,
                waiting_requests=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                kv_used_fraction=scheduler_stats.kv_cache_usage,
            )
            sample, scheduler_stats.kv_connector_stats = take_step(scheduler_stats.kv_connector_stats)
            if sample is not None:
                self.samples.add((sample,))
            change, scheduler_stats.kv_connector_stats = take_blocks(scheduler_stats.kv_connector_stats)
            if change:
                self.blocks.apply(change)

    def log_engine_initialized(self) -> None:
        pass


def _given_up(request: EngineRequest, *, has_tokens: bool) -> TandemError:
    """Why a run ended with an error: before its first token a structured output is at fault, and no other engine would take it."""
    if request.sampling.structured_output is None or has_tokens:
        return EngineError("the engine gave this request up")
    if request.resumed_tokens:
        return InvalidRequestError("resume_token_ids", "do not fit the structured output")
    return InvalidRequestError("sampling.structured_output", "could not be compiled")


def _to_output(choice: CompletionOutput, cached_tokens: int, top: int | None) -> EngineOutput:
    logprobs = tuple(
        _to_logprobs(token_id, candidates, top or 0) for token_id, candidates in zip(choice.token_ids, choice.logprobs or (), strict=False)
    )
    return EngineOutput(
        choice_index=choice.index,
        token_ids=tuple(choice.token_ids),
        logprobs=logprobs,
        finish_reason=None if choice.finish_reason is None else FinishReason(choice.finish_reason),
        stop_reason=None if choice.stop_reason is None else str(choice.stop_reason),
        cached_tokens=cached_tokens,
    )


def _to_logprobs(token_id: int, candidates: dict[int, Any], top: int) -> Logprobs:
    ranked = [
        TokenLogprob(token_id=int(candidate), logprob=float(entry.logprob), rank=int(entry.rank)) for candidate, entry in candidates.items()
    ]
    ranked.sort(key=lambda entry: entry.rank)
    sampled = next(entry for entry in ranked if entry.token_id == token_id)
    return Logprobs(sampled=sampled, top=tuple(entry for entry in ranked if entry.rank <= top))
