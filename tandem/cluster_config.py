"""What one cluster is to be: its models, their replicas, its routers, ports and stores. Resolved once, then sent as JSON.

Order: defaults, the file (TOML), TANDEM_* variables, flags. Must not start or connect to anything.
"""

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from tandem.config import MIB
from tandem.config_section import read_section as read_section
from tandem.domain import Role
from tandem.engine.simulated_physics import StepProfile
from tandem.errors import ConfigError
from tandem.tenancy import Tenant, validate_tenants
from tandem.tenant_config import read_tenants, tenants_to_tables

MAX_MODELS = 64
VLLM, SIMULATED = ENGINES = ("vllm", "simulated")
_CPUS = {VLLM: 0.25, SIMULATED: 0.02}  # on CPU engines share cores, and Ray must not refuse the fourth on two
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float", "half")  # vLLM's
_CLUSTER = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model and its two pools. A range `min_* == max_*` switches scaling off for that pool."""

    model: str = "bundled"  # folder, hub name or "bundled"
    name: str = ""  # what clients call it; empty: the folder's or hub name
    engine: str = VLLM  # or "simulated": real but for the model, whose steps take the time that step_profile says
    step_profile: Mapping[str, object] = field(default_factory=dict)  # of a simulated engine: simulated_physics.StepProfile
    slowdowns: Mapping[str, object] = field(default_factory=dict)  # of simulated replicas by id: stragglers, for tests
    prefill: int = 1
    decode: int = 1
    min_prefill: int | None = None  # None: as many as at the start, so that nothing is scaled that was not asked for
    max_prefill: int | None = None
    min_decode: int | None = None
    max_decode: int | None = None
    dtype: str = "auto"
    kv_cache_bytes: int = 128 * MIB
    kv_store_bytes: int = 0  # what its blocks may take of a node's store_capacity_bytes; 0: no limit
    context_tokens: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    cpus_per_replica: float | None = None  # declared to Ray; None: the engine's usual ones
    gpus_per_replica: float = 0.0
    memory_bytes_per_replica: int = 0  # declared to Ray; 0: estimated from the weights and the KV cache
    faults: str = ""

    @property
    def declared_cpus(self) -> float:
        """What a replica takes of the CPUs that Ray gives away."""
        return _CPUS[self.engine] if self.cpus_per_replica is None else self.cpus_per_replica

    def profile_of(self, replica_id: str) -> Mapping[str, object]:
        """The step profile of one replica."""
        if replica_id not in self.slowdowns:
            return self.step_profile
        return {**self.step_profile, "slowdown": self.slowdowns[replica_id]}

    def replicas(self, role: Role) -> int:
        """Replicas at the start."""
        return self.prefill if role is Role.PREFILL else self.decode

    def bounds(self, role: Role) -> tuple[int, int]:
        """The least and the most replicas the autoscaler may choose."""
        initial = self.replicas(role)
        low, high = (self.min_prefill, self.max_prefill) if role is Role.PREFILL else (self.min_decode, self.max_decode)
        return (initial if low is None else low), (max(initial, low or 0) if high is None else high)

    def validate(self, where: str) -> None:
        """Raises ConfigError naming the key."""
        for key in ("prefill", "decode", "min_prefill", "max_prefill", "min_decode", "max_decode"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1000:
                raise ConfigError(f"{where}{key} must be from 0 to 1000, got {value}")
        for role in Role:
            low, high = self.bounds(role)
            if not low <= self.replicas(role) <= high:
                raise ConfigError(f"{where}{role} = {self.replicas(role)} is outside min_{role} = {low} and max_{role} = {high}")
        if sum(self.bounds(role)[1] for role in Role) < 1:
            raise ConfigError(f"{where}prefill and {where}decode are both 0: at least one replica is needed")
        if self.kv_cache_bytes < 16 * MIB:
            raise ConfigError(f"{where}kv_cache_bytes must be at least {16 * MIB}, got {self.kv_cache_bytes}")
        if self.kv_store_bytes < 0:
            raise ConfigError(f"{where}kv_store_bytes must not be negative, got {self.kv_store_bytes}")
        if self.name and not _NAME.fullmatch(self.name):
            raise ConfigError(f"{where}name {self.name!r} must have 1 to 128 letters, digits or . _ / : -")
        for key in ("cpus_per_replica", "gpus_per_replica", "memory_bytes_per_replica"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{where}{key} must be a number and not negative, got {value}")
        for key in ("max_num_seqs", "max_num_batched_tokens", "context_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{where}{key} must be at least 1, got {value}")
        self._validate_engine(where)

    def _validate_engine(self, where: str) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"{where}engine {self.engine!r} is not known; valid are {', '.join(ENGINES)}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"{where}dtype {self.dtype!r} is not known; valid are {', '.join(_DTYPES)}")
        if self.engine != SIMULATED and (self.step_profile or self.slowdowns):
            raise ConfigError(f"{where}step_profile and slowdowns are for engine = {SIMULATED!r}, and it is {self.engine!r}")
        read_section(StepProfile, self.step_profile, f"{where}step_profile.").validate(f"{where}step_profile.")
        for replica_id, factor in self.slowdowns.items():
            key = f"{where}slowdowns.{replica_id}"
            if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0.0 < factor < math.inf:
                raise ConfigError(f"{key} must be a number above 0, got {factor!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Everything `tandem up` starts."""

    cluster: str = ""  # empty: user id and random; prefixes Redis keys, the Ray namespace and files
    host: str = "127.0.0.1"  # of every listener
    port: int = 8470  # gRPC of the first router, the next ones count up; 0: any free ones
    http_port: int = 8480  # HTTP, likewise
    routers: int = 1
    autoscalers: int = 1  # more than one: the others stand by
    event_log: str = ""  # folder of the routers' event logs, for `python -m router.replay`; empty: none
    redis_url: str = ""  # empty: a server of its own on a Unix socket
    ray_address: str = ""  # empty: a Ray head of its own
    store_dir: str = ""  # empty: a folder of this cluster's own in /dev/shm
    store_capacity_bytes: int = 1024 * MIB
    kv_tenant_bytes: int = 0  # what one tenant's blocks may take of a node's store_capacity_bytes; 0: no limit
    kv_disk: str = ""  # folder on each node's disk where blocks outlive the cluster; empty: none
    kv_disk_bytes: int = 16 * 1024 * MIB  # of that folder
    kv_redis_url: str = ""  # a Redis that blocks overflow into, not the one of REDIS_URL; empty: none, or one of its own
    kv_redis_bytes: int = 0  # memory of one of its own; 0: none
    models: tuple[ModelConfig, ...] = (ModelConfig(),)
    tenants: tuple[Tenant, ...] = ()  # [tenants.NAME]; none: everybody is one tenant, and no key is asked for
    router: Mapping[str, object] = field(default_factory=dict)  # router.config.RouterConfig
    scaler: Mapping[str, object] = field(default_factory=dict)  # autoscaler.config.ScalerConfig
    _path: Path | None = field(default=None, compare=False)  # for errors alone, so that it does not travel

    @property
    def path(self) -> Path | None:
        """The file it was read from."""
        return self._path

    def validate(self) -> None:
        """Raises ConfigError naming the key."""
        if self.cluster and not _CLUSTER.fullmatch(self.cluster):
            raise ConfigError(f"cluster {self.cluster!r} must have 1 to 24 small letters, digits or dashes, and begin with no dash")
        if not self.host:
            raise ConfigError("host must not be empty")
        for key, high in (("routers", 16), ("autoscalers", 8)):
            if not 1 <= getattr(self, key) <= high:
                raise ConfigError(f"{key} must be from 1 to {high}, got {getattr(self, key)}")
        self._validate_ports()
        if not 1 <= len(self.models) <= MAX_MODELS:
            raise ConfigError(f"models: from 1 to {MAX_MODELS} models, got {len(self.models)}")
        for index, model in enumerate(self.models):
            model.validate(f"models[{index}].")
        validate_tenants(self.tenants)
        if self.store_capacity_bytes < 16 * MIB:
            raise ConfigError(f"store_capacity_bytes must be at least {16 * MIB}, got {self.store_capacity_bytes}")
        if self.kv_tenant_bytes < 0:
            raise ConfigError(f"kv_tenant_bytes must not be negative, got {self.kv_tenant_bytes}")
        if self.kv_disk and self.kv_disk_bytes < 64 * MIB:
            raise ConfigError(f"kv_disk_bytes must be at least {64 * MIB}, got {self.kv_disk_bytes}")
        if self.kv_redis_bytes and self.kv_redis_bytes < 16 * MIB:
            raise ConfigError(f"kv_redis_bytes must be 0 or at least {16 * MIB}, got {self.kv_redis_bytes}")
        if self.kv_redis_url and self.kv_redis_bytes:
            raise ConfigError("kv_redis_url names a server, and kv_redis_bytes asks for one of its own: give one of them")
        if self.kv_redis_bytes and self.ray_address:
            raise ConfigError("kv_redis_bytes starts a server on this machine, which other nodes cannot reach: give kv_redis_url")
        if self.kv_redis_url and self.kv_redis_url == self.redis_url:
            raise ConfigError("kv_redis_url is the control database of redis_url, which must never evict: give another server")

    def _validate_ports(self) -> None:
        """The routers' ports count up from the first; those of gRPC and HTTP must not meet."""
        last = 65_535 - self.routers + 1
        for key in ("port", "http_port"):
            if not 0 <= getattr(self, key) <= last:
                raise ConfigError(f"{key} must be from 0 to {last} (routers = {self.routers}), got {getattr(self, key)}")
        if self.port and self.http_port and abs(self.port - self.http_port) < self.routers:
            ports = f"port {self.port} and http_port {self.http_port}"
            raise ConfigError(f"{ports} must be at least {self.routers} apart (routers = {self.routers})")

    def to_json(self) -> str:
        """For other processes; `cluster_config_from_json` reads it. Of tenants' keys it holds hashes."""
        values = {**asdict(self), "tenants": tenants_to_tables(self.tenants)}
        del values["_path"]
        return json.dumps(values)


def cluster_config_from_json(text: str) -> ClusterConfig:
    """The configuration that `to_json` wrote. Raises ConfigError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the cluster's configuration is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the cluster's configuration must be an object, got {type(values).__name__}")
    return _cluster_from(values, "", {})


def load_cluster_config(path: Path | None, overrides: Mapping[str, object], environ: Mapping[str, str] | None = None) -> ClusterConfig:
    """Defaults, then the file, then TANDEM_* variables, then `overrides` (None values are absent; `router` adds to the file's).

    Raises ConfigError.

    Keys of ModelConfig among the overrides are the first model's, and only where the file names no more than one.
    """
    environ = os.environ if environ is None else environ
    config = ClusterConfig() if path is None else replace(_cluster_from(read_toml(path), f"{path}: ", environ), _path=path)
    given = {**_from_environment(environ), **{key: value for key, value in overrides.items() if value is not None}}
    given["router"] = {**config.router, **given.get("router", {})}  # type: ignore[dict-item]
    cluster_keys = {item.name for item in fields(ClusterConfig)}
    of_model = {key: value for key, value in given.items() if key not in cluster_keys}
    config = replace(config, **{key: value for key, value in given.items() if key in cluster_keys})  # type: ignore[arg-type]
    if of_model and len(config.models) > 1:
        raise ConfigError(f"--{min(of_model).replace('_', '-')} is for one model, and {path} has several: set it there")
    if of_model and config.models:
        config = replace(config, models=(replace(config.models[0], **of_model),))  # type: ignore[arg-type]
    config.validate()
    return config


def parse_slowdowns(texts: Sequence[str]) -> dict[str, object]:
    """`bundled-decode-1=2.5` for each slow replica. Raises ConfigError."""
    slowdowns: dict[str, object] = {}
    for text in texts:
        replica_id, _, factor = text.rpartition("=")
        try:
            slowdowns[replica_id] = float(factor)
        except ValueError:
            replica_id = ""
        if not replica_id:
            raise ConfigError(f"--slowdown {text!r} is not REPLICA=FACTOR: bundled-decode-1=2.5")
    return slowdowns


def _cluster_from(values: Mapping[str, Any], where: str, environ: Mapping[str, str]) -> ClusterConfig:
    tables = values.get("models", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{where}models must be a list of tables: [[models]]")
    models = tuple(read_section(ModelConfig, table, f"{where}models[{index}].") for index, table in enumerate(tables))
    tenants = read_tenants(values.get("tenants", {}), where, environ)
    plain = {key: value for key, value in values.items() if key not in ("models", "tenants")}
    return replace(read_section(ClusterConfig, plain, where), models=models, tenants=tenants)


def read_toml(path: Path) -> dict[str, Any]:
    """A file's table. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    """TANDEM_<KEY> for every plain key, and the names that Redis and Ray users know; an empty variable is none."""
    hints = get_type_hints(ClusterConfig)
    found: dict[str, object] = {}
    for key, hint in hints.items():
        text = environ.get(f"TANDEM_{key.upper()}")
        if not text or hint not in (int, str):
            continue
        if hint is int and not text.isdecimal():
            raise ConfigError(f"TANDEM_{key.upper()} must be a number, got {text!r}")
        found[key] = int(text) if hint is int else text
    for key, name in (("redis_url", "REDIS_URL"), ("ray_address", "RAY_ADDRESS")):
        if environ.get(name):
            found.setdefault(key, environ[name])
    return found
