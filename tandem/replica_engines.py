"""Which engine a replica runs, by name, and how each is built with its way to the KV store.

Must not import an engine before it is asked for: the simulated one starts where vLLM is not installed.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from kv_transfer.blocks import block_hashes, make_namespace
from kv_transfer.link import StoreLink
from kv_transfer.shm_room import check_room
from tandem.cluster_config import SIMULATED, VLLM
from tandem.config import ReplicaConfig
from tandem.domain import Namespace
from tandem.engine.environment import require_vllm
from tandem.engine_watch import WatchedEngine
from tandem.errors import ConfigError

_MAX_SOCKET_PATH = 107  # bytes: sun_path
_ENGINE_SOCKET_CHARS = 37  # a slash and a UUID


def build_engine(config: ReplicaConfig) -> tuple[WatchedEngine, Namespace]:
    """The engine, and the namespace of its blocks. Raises ConfigError."""
    build = _ENGINES.get(config.engine.engine)
    if build is None:
        raise ConfigError(f"engine {config.engine.engine!r} is not known; valid are {', '.join(_ENGINES)}")
    if config.engine.is_kv_transfer_on:
        check_room(Path(config.engine.store_dir))
    return build(config)


def _build_vllm(config: ReplicaConfig) -> tuple[WatchedEngine, Namespace]:
    require_vllm()
    from tandem.engine.vllm_engine import VllmEngine, namespace_parts

    if len(config.runtime_dir) < _MAX_SOCKET_PATH - _ENGINE_SOCKET_CHARS:
        os.environ["VLLM_RPC_BASE_PATH"] = config.runtime_dir  # else in the system's folder, where nobody removes them after a SIGKILL
    namespace = make_namespace(namespace_parts(config.engine))
    link = None
    if config.engine.is_kv_transfer_on:
        link = StoreLink(config.engine, namespace, Path(config.runtime_dir), config.replica_id)
    return VllmEngine(config.engine, link), namespace


def _build_simulated(config: ReplicaConfig) -> tuple[WatchedEngine, Namespace]:
    from kv_transfer.local_blocks import LocalBlocks
    from tandem.engine.simulated import SimulatedEngine
    from tandem.engine.simulated_model import namespace_parts, read_profile

    namespace = make_namespace(namespace_parts(config.engine))
    store = None
    if config.engine.is_kv_transfer_on:
        store = LocalBlocks(config.engine, namespace, read_profile(config.engine).block_bytes)
    return SimulatedEngine(config.engine, block_hashes, store), namespace


_ENGINES: Mapping[str, Callable[[ReplicaConfig], tuple[WatchedEngine, Namespace]]] = {VLLM: _build_vllm, SIMULATED: _build_simulated}
