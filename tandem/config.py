"""Settings of each process: field, unit, default, and why this default. Read once in a `main`, passed down.

Must not read the environment or files at import time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

MIB = 1 << 20
PREFETCH_WAIT_S = 1.0  # a prefix of 2,000 tokens of the bundled model comes in 20 ms, and is computed in 200


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a replica's engine is built."""

    engine: str = "vllm"  # or "simulated" (tandem/engine/README.md)
    step_profile: Mapping[str, object] = field(default_factory=dict)  # of a simulated one: simulated_physics.StepProfile
    model: str = "bundled"
    dtype: str = "auto"  # "auto": fp32 on CPU, where tokens are to be exact; the model's own elsewhere
    block_size_tokens: int = 32  # the CPU backend takes multiples of 32; one block is the most that a hand-off recomputes
    context_tokens: int | None = None  # the model's own
    kv_cache_bytes: int = 128 * MIB  # 65,536 tokens of the bundled model; always explicit, else vLLM takes most of the machine
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048  # one chunk: what a prefill step computes, and what is published at once
    seed: int = 0  # one per replica, else two workers draw the same numbers
    is_kv_transfer_on: bool = True
    store_dir: str = ""
    store_capacity_bytes: int = 1024 * MIB
    kv_store_bytes: int = 0  # what this model's blocks may take of a node's arena; 0: no limit
    sync_load_bytes: int = 64 * MIB  # loaded inside one step at most: 64 MiB take about 5 ms
    faults: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """One replica process."""

    replica_id: str
    role: str
    incarnation: int
    served_model: str
    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0
    node: str = "local"
    store_address: str = ""  # host:port of this node's store service; empty: none, so nothing is fetched from other nodes
    prefetch_wait_s: float = 0.0  # for blocks of other nodes and lower tiers, before a prompt is computed; 0: they are not asked for
    cluster: str = ""
    redis_url: str = ""  # where the replica takes its lease; empty: it takes none, and routers know it by its address
    runtime_dir: str = ""  # private folder for sockets
    log_path: str = ""  # stdout and stderr of a forked replica; empty: the zygote's
    watch_interval_s: float = 0.1  # 10 Hz: a queue state half a second old costs 23 points of SLO attainment (reference: algorithms)
    publish_wait_s: float = 5.0  # longer than any publication takes; then the decode worker computes what is not there
    orphan_s: float = 60.0  # how long it serves on without a supervisor: a new Ray head and its actors take 12 to 30
    drain_s: float = 25.0  # what runs at a SIGTERM may go on as long: machines that are taken away give 30 s
    silence_s: float = 15.0  # without an answer from its event loop, then it hangs; a busy machine costs a second or two
    step_timeout_s: float = 30.0  # a step of its engine; ten times that while the engine computes, as a large model on a CPU does

    def to_json(self) -> str:
        """For another process; `replica_config_from_json` reads it."""
        return json.dumps(asdict(self))

    def fingerprint(self) -> str:
        """Equal where a process that runs with the one configuration is what the other asks for: each life has its own ports and seed."""
        same = replace(self, incarnation=0, port=0, metrics_port=0, engine=replace(self.engine, seed=0))
        return hashlib.sha256(same.to_json().encode()).hexdigest()[:16]


def replica_config_from_json(text: str) -> ReplicaConfig:
    """The configuration that `to_json` wrote; raises TypeError on unknown keys."""
    fields = json.loads(text)
    return ReplicaConfig(**{**fields, "engine": EngineConfig(**fields["engine"])})
