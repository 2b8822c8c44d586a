"""How long one decision takes: `RouterCore.submit` of a prompt whose blocks are known, by the number of replicas.

Must not hash or tokenise: those come before, and are measured apart.
"""

import gc
import time
from dataclasses import dataclass
from random import Random

import numpy as np

from router.block_probe_library import load_probe
from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import Dispatch
from tandem.domain import BlockHash, EngineInfo, Lease, ModelId, Namespace, Receipt, ReplicaId, ReplicaState, Request, RequestId, Role
from tandem.held_blocks import BlockChange
from tandem.short_hash import short_hashes
from tandem.step_sample import StepSample

_MODEL = ModelId("m")
_BLOCK_TOKENS = 32
_HOLDERS = 40
_PROMPTS = 16
_RUNNING = 64  # requests at any time
_WARM = 200
_GAP_S = 5e-4  # simulated, between two arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionTimes:
    """Of one number of replicas, half of them prefill. Seconds; those after the decision (first token, end) apart."""

    replicas: int
    decisions: int
    p50_s: float
    p99_s: float
    mean_s: float
    after_mean_s: float

    @property
    def decisions_per_s(self) -> float:
        """On one core."""
        return 1.0 / self.mean_s

    @property
    def requests_per_s(self) -> float:
        """On one core, with the first token's and the end's work of each request."""
        return 1.0 / (self.mean_s + self.after_mean_s)


def measure_decisions(replicas: int, prompt_blocks: int, decisions: int) -> DecisionTimes:
    """Requests come one after the other, run for a while and end; all of their blocks are held by 40 replicas."""
    rng = np.random.default_rng(3)
    core = _core(replicas)
    prompts = [[BlockHash(rng.bytes(32)) for _ in range(prompt_blocks)] for _ in range(_PROMPTS)]
    for blocks in prompts:
        change = BlockChange(stored=short_hashes(blocks).tobytes())
        for number in rng.choice(replicas // 2, min(replicas // 2, _HOLDERS), replace=False):
            core.cached(ReplicaId(f"prefill-{number:04}"), 1, change)
    token_ids = (7,) * (prompt_blocks * _BLOCK_TOKENS)
    took_s, after_s, running, now_s = list[float](), list[float](), list[Dispatch](), 1.0
    gc.collect()
    gc.disable()
    try:
        for number in range(decisions + _WARM):
            now_s += _GAP_S
            request = Request(request_id=RequestId(f"r{number}"), model=_MODEL, prompt_token_ids=token_ids)
            began_s = time.perf_counter()
            instructions = core.submit(request, block_hashes=prompts[number % _PROMPTS], deadline_s=None, now_s=now_s)
            decided_s = time.perf_counter()
            for instruction in instructions:
                assert isinstance(instruction, Dispatch)
                core.tokens(instruction.request_id, instruction.attempt, 1, now_s)
                running.append(instruction)
            if len(running) > _RUNNING:
                ended = running.pop(0)
                receipt = Receipt(request_id=ended.request_id, prefill_s=0.02, ttft_s=0.021, e2e_s=0.5, output_tokens=50)
                core.finished(ended.request_id, ended.attempt, receipt, now_s)
            if number >= _WARM:
                took_s.append(decided_s - began_s)
                after_s.append(time.perf_counter() - decided_s)
    finally:
        gc.enable()
    p50_s, p99_s = (float(np.quantile(took_s, quantile)) for quantile in (0.5, 0.99))
    return DecisionTimes(
        replicas=replicas,
        decisions=decisions,
        p50_s=p50_s,
        p99_s=p99_s,
        mean_s=float(np.mean(took_s)),
        after_mean_s=float(np.mean(after_s)),
    )


def _core(replicas: int) -> RouterCore:
    """With step times learnt, as after a minute's work."""
    core = RouterCore(RouterConfig(max_running_requests=100_000, max_queued_requests=100_000), Random(1), bind_probe=load_probe())
    engine = EngineInfo(
        block_size_tokens=_BLOCK_TOKENS,
        context_tokens=1 << 17,
        vocabulary_tokens=1 << 17,
        kv_blocks=1 << 15,
        kv_block_bytes=1 << 16,
        dtype="float32",
        engine="vllm",
        engine_version="",
        eos_token_ids=(),
        max_num_seqs=256,
        max_num_batched_tokens=8192,
    )
    for number in range(replicas // 2):
        for role in Role:
            name = f"{role}-{number:04}"
            lease = Lease(
                replica_id=ReplicaId(name),
                incarnation=1,
                node=f"node-{number // 8}",
                role=role,
                model=_MODEL,
                model_path="",
                namespace=Namespace("n"),
                address=f"{name}:1",
                engine=engine,
                state=ReplicaState.READY,
            )
            core.replica_seen(lease, 0.0)
            steps = [
                StepSample(
                    prefill_tokens=tokens,
                    prefill_pairs=tokens * tokens // 2,
                    decode_requests=0,
                    kv_tokens=0,
                    duration_s=tokens * 2e-5 + 0.01,
                )
                for tokens in (512, 2048, 8192)
            ]
            steps += [
                StepSample(prefill_tokens=0, prefill_pairs=0, decode_requests=batch, kv_tokens=900 * batch, duration_s=0.005 + 4e-5 * batch)
                for batch in (8, 32, 64)
            ]
            core.steps(lease.replica_id, 1, steps, number / 100.0)
    return core
