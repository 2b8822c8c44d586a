"""Words for conversations with the router core: events in, the one instruction expected out."""

from collections.abc import Sequence
from random import Random
from typing import Any

from router.config import RouterConfig
from router.core import RouterCore
from router.instructions import Dispatch, Instruction, Reject
from tandem.domain import BlockHash, RequestId, Role
from tandem.errors import EngineError
from tests.samples import make_lease, make_request

R1, R2, R3 = (RequestId(f"r{number}") for number in (1, 2, 3))
HASHES = [BlockHash(bytes([number])) for number in range(3)]
HANDING_OFF = RouterConfig(one_worker_max_tokens=0)
LOST = EngineError("died")


def make_core(*, replicas: Sequence[str] = ("prefill-0", "decode-0"), config: RouterConfig | None = None) -> RouterCore:
    core = RouterCore(HANDING_OFF if config is None else config, Random(7))
    for name in replicas:
        assert core.replica_seen(make_lease(name, Role(name.split("-")[0])), 0.0) == []
    return core


def submit(
    core: RouterCore,
    request_id: str = "r1",
    now_s: float = 0.0,
    *,
    deadline_s: float | None = None,
    prompt_tokens: int = 100,
    is_begun: bool = False,
    **changes: Any,
) -> list[Instruction]:
    """`changes` are the request's."""
    request = make_request(request_id, prompt_tokens, **changes)
    instructions = core.submit(request, block_hashes=HASHES, deadline_s=deadline_s, now_s=now_s, is_begun=is_begun)
    core.check_invariants()
    return instructions


def only_dispatch(instructions: Sequence[Instruction]) -> Dispatch:
    (instruction,) = instructions
    assert isinstance(instruction, Dispatch)
    return instruction


def only_reject(instructions: Sequence[Instruction]) -> Reject:
    (instruction,) = instructions
    assert isinstance(instruction, Reject)
    return instruction


def predicted_work(core: RouterCore, now_s: float = 0.0) -> dict[str, float]:
    core.check_invariants()
    return {status.lease.replica_id: status.predicted_work_s for status in core.replicas(now_s)}
