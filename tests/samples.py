"""Small valid values of the domain for tests: change what a test is about, leave the rest."""

from dataclasses import replace
from typing import Any

from tandem.domain import EngineInfo, Lease, ModelId, Namespace, ReplicaId, Request, RequestId, Role, Sampling

BLOCK_SIZE_TOKENS = 32

ENGINE = EngineInfo(
    block_size_tokens=BLOCK_SIZE_TOKENS,
    context_tokens=1024,
    vocabulary_tokens=2048,
    kv_blocks=1000,
    kv_block_bytes=131_072,
    dtype="float32",
    engine="simulated",
    engine_version="1",
    eos_token_ids=(0,),
    max_num_seqs=64,
    max_num_batched_tokens=2048,
)


def make_lease(replica_id: str = "decode-0", role: Role = Role.DECODE, incarnation: int = 1, **changes: Any) -> Lease:
    """A ready replica of model "m"."""
    lease = Lease(
        replica_id=ReplicaId(replica_id),
        incarnation=incarnation,
        node="node-0",
        role=role,
        model=ModelId("m"),
        model_path="",
        namespace=Namespace("ns"),
        address=f"{replica_id}:1",
        engine=ENGINE,
    )
    return replace(lease, **changes)


def make_request(request_id: str = "r1", prompt_tokens: int = 100, sampling: Sampling | None = None, **changes: Any) -> Request:
    """A request for model "m" with `prompt_tokens` tokens."""
    request = Request(
        request_id=RequestId(request_id),
        model=ModelId("m"),
        prompt_token_ids=tuple(range(1, prompt_tokens + 1)),
        sampling=Sampling(max_tokens=16) if sampling is None else sampling,
    )
    return replace(request, **changes)
