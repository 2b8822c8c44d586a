"""What a simulation compares: policies, and ablations and bounds of the default one, by name. Must not run them."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from router.policies import DEFAULT_POLICY, POLICIES
from tandem.errors import ConfigError

_Known = TypeVar("_Known")


class Kind(StrEnum):
    """What a row of the comparison is."""

    OURS = "ours"
    PEER = "peer"
    BOUND = "bound"
    ABLATION = "ablation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row. `is_told_physics`: its predictor knows the engines' true coefficients. `has_free_store`: all blocks for ever, at no cost."""

    name: str
    policy: str
    kind: Kind
    is_told_physics: bool = False
    knows_store: bool = True
    has_free_store: bool = False
    is_without_queue: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where KV blocks may be. Tokens."""

    name: str
    local_tokens: int
    store_tokens: int | None


SETTINGS: Mapping[str, Setting] = {
    "local": Setting(name="local", local_tokens=3_000_000, store_tokens=None),
    # The same memory pooled, and in each engine what fits its GPU.
    "global": Setting(name="global", local_tokens=945_029, store_tokens=50_000_000),
}

_OTHERS = (
    Variant(name="predicted_ttft_true_model", policy=DEFAULT_POLICY, kind=Kind.ABLATION, is_told_physics=True),
    Variant(name="predicted_ttft_blind_to_store", policy=DEFAULT_POLICY, kind=Kind.ABLATION, knows_store=False),
    Variant(name="infinite_free_cache", policy=DEFAULT_POLICY, kind=Kind.BOUND, has_free_store=True),
    Variant(name="infinite_capacity", policy=DEFAULT_POLICY, kind=Kind.BOUND, is_without_queue=True),
)

VARIANTS: Mapping[str, Variant] = {
    **{name: Variant(name=name, policy=name, kind=Kind.OURS if name == DEFAULT_POLICY else Kind.PEER) for name in POLICIES},
    **{variant.name: variant for variant in _OTHERS},
}


def chosen_variants(names: list[str]) -> list[Variant]:
    """Those named, all where none is. Raises ConfigError that lists the valid ones."""
    return [_named("--policy", name, VARIANTS) for name in names or VARIANTS]


def chosen_settings(names: list[str]) -> list[Setting]:
    """Those named, all where none is. Raises ConfigError that lists the valid ones."""
    return [_named("--setting", name, SETTINGS) for name in names or SETTINGS]


def _named(option: str, name: str, known: Mapping[str, _Known]) -> _Known:
    try:
        return known[name]
    except KeyError as error:
        raise ConfigError(f"{option}: there is no {name!r}; there are: {', '.join(known)}") from error
