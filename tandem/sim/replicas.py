"""Who simulated replicas say they are. Must not run them."""

from tandem.domain import EngineInfo, Lease, ModelId, Namespace, ReplicaId, Role
from tandem.sim.engine_profile import EngineProfile
from tandem.workload import TRACE_BLOCK_TOKENS

MODEL = ModelId("simulated")
NAMESPACE = Namespace("simulated")


def simulated_lease(role: Role, index: int, profile: EngineProfile) -> Lease:
    """Of one replica, on a node of its own."""
    name = f"{role}-{index:04d}"
    engine = EngineInfo(
        block_size_tokens=TRACE_BLOCK_TOKENS,
        context_tokens=profile.kv_room_tokens,
        vocabulary_tokens=1 << 17,
        kv_blocks=profile.kv_room_tokens // TRACE_BLOCK_TOKENS,
        kv_block_bytes=profile.kv_bytes_per_token * TRACE_BLOCK_TOKENS,
        dtype="fp8",
        engine="simulated",
        hardware="simulated",
        engine_version="1",
        eos_token_ids=(),
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
    )
    return Lease(
        replica_id=ReplicaId(name),
        incarnation=1,
        node=name,
        role=role,
        model=MODEL,
        model_path="",
        namespace=NAMESPACE,
        address=name,
        engine=engine,
    )
