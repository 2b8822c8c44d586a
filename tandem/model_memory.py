"""How much memory one replica takes: what is declared to Ray, and checked before anything starts."""

from tandem.cluster_config import SIMULATED, ModelConfig
from tandem.config import MIB
from tandem.engine.model_files import resolve_model

# A forked replica's own pages without weights and KV, front and engine core together (measured: 300 MiB with 64 MiB of KV).
_PROCESS_BYTES = 256 * MIB
_SIMULATED_BYTES = 96 * MIB  # of a simulated replica, all in all (measured: 72 MiB of its own)
_FP32_FACTOR = 2  # 16-bit weights on CPU become fp32


def replica_memory_bytes(model: ModelConfig) -> int:
    """An upper estimate in bytes: weights, KV cache, processes. Raises ConfigError where there is no such model."""
    if model.engine == SIMULATED:
        return _SIMULATED_BYTES
    weights_bytes = sum(
        path.stat().st_size for path in resolve_model(model.model).iterdir() if path.suffix in (".safetensors", ".bin", ".pt")
    )
    return _FP32_FACTOR * weights_bytes + model.kv_cache_bytes + _PROCESS_BYTES
