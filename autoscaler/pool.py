"""What reconcile works on: the replicas that were asked for, by name, and the two things that can be done about them.

`ray_pool.py` implements it; tests have a fake.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from autoscaler.observation import PoolKey
from tandem.cluster_config import ClusterConfig, ModelConfig
from tandem.domain import ModelId, ReplicaId, Role
from tandem.engine.model_files import served_name
from tandem.errors import ConfigError
from tandem.supervisor import SupervisedState

_NAME = re.compile(r"(?P<slug>.+)-(?P<role>prefill|decode)-(?P<number>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReplica:
    """One replica that was asked for. FAILED: it died too often, or never came up; STOPPED: its supervisor is gone."""

    replica_id: ReplicaId
    key: PoolKey
    state: SupervisedState
    incarnation: int = 0  # of the process that serves; 0 while none does
    address: str = ""
    pid: int = 0
    error: str = ""


class ReplicaPool(Protocol):
    """Replicas by name, wherever they run."""

    @property
    def replicas(self) -> Mapping[ReplicaId, PoolReplica]:
        """What is there, as last heard."""

    @property
    def orphans(self) -> Collection[ReplicaId]:
        """Names whose replica may serve on without a supervisor: whoever asks for one of them has it adopted."""

    async def refresh(self) -> None:
        """Looks for what others started. Raises UnavailableError where that cannot be seen."""

    async def add(self, key: PoolKey, replica_id: ReplicaId) -> None:
        """Asks for one more; raises UnavailableError where that cannot be done now."""

    async def remove(self, replica_id: ReplicaId) -> None:
        """Stops it for good and forgets it."""


class ReplicaNames:
    """`<model>-<role>-<number>`: which pool a name belongs to, and the next free one."""

    def __init__(self, models: Iterable[ModelConfig]) -> None:
        self._slugs: dict[str, ModelConfig] = {}
        for model in models:
            slug = base = re.sub(r"[^a-z0-9]+", "-", model_name(model).lower()).strip("-") or "model"
            number = 2
            while slug in self._slugs:
                slug, number = f"{base}-{number}", number + 1
            self._slugs[slug] = model

    def try_parse(self, name: str) -> PoolKey | None:
        """The pool of a replica's name; None for names of other things and of models that are configured no more."""
        match = _NAME.fullmatch(name)
        model = self._slugs.get(match["slug"]) if match else None
        return None if match is None or model is None else PoolKey(model=model_name(model), role=Role(match["role"]))

    def free(self, key: PoolKey, taken: Iterable[str], first: Iterable[ReplicaId] = ()) -> ReplicaId:
        """The lowest name of the pool that is not taken, those of `first` before all others."""
        used = set(taken)
        wanted = [name for name in sorted(first) if name not in used and self.try_parse(name) == key]
        if wanted:
            return wanted[0]
        slug = next(slug for slug, model in self._slugs.items() if model_name(model) == key.model)
        number = 0
        while f"{slug}-{key.role}-{number}" in used:
            number += 1
        return ReplicaId(f"{slug}-{key.role}-{number}")

    def config(self, key: PoolKey) -> ModelConfig:
        """The pool's model."""
        return next(model for model in self._slugs.values() if model_name(model) == key.model)


def model_name(model: ModelConfig) -> ModelId:
    """What clients call it."""
    return ModelId(model.name or served_name(model.model))


def check_models(config: ClusterConfig) -> None:
    """Raises ConfigError where two models have one name."""
    names = [model_name(model) for model in config.models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two models are called {twice!r}: give each a name of its own")
