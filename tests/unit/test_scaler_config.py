"""Bounds and settings that make no sense are refused by name."""

from typing import Any

import pytest

from autoscaler.config import PoolLimits, ScalerConfig
from autoscaler.core import ScalerCore
from tandem.domain import ModelId, Role
from tandem.errors import ConfigError
from tests.scaler_talk import DECODE, limits


def test_the_defaults_are_valid() -> None:
    ScalerConfig().validate()
    PoolLimits(model=ModelId("m"), role=Role.DECODE).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale_up_backlog_s", 0.0),
        ("idle_s", -1.0),
        ("cooldown_s", float("nan")),
        ("up_window_s", float("inf")),
        ("consolidation_fraction", 1.1),
        ("down_step_fraction", 2.0),
        ("up_factor", 1.0),
        ("target_drain_s", 1.1),
        ("target_load_fraction", 0.9),
        ("backoff_first_s", 61.0),
    ],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ScalerConfig(**{name: value}).validate()


@pytest.mark.parametrize(("low", "initial", "high"), [(-1, 0, 1), (2, 1, 3), (0, 3, 2)])
def test_bounds_out_of_order_are_refused(low: int, initial: int, high: int) -> None:
    with pytest.raises(ConfigError, match=r"decode pool of 'm': replicas must be 0 <= min <= initial <= max"):
        ScalerCore([limits(Role.DECODE, low, high, initial)], ScalerConfig())


def test_a_pool_configured_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="the decode pool of 'm' is configured twice"):
        ScalerCore([limits(Role.DECODE), limits(Role.DECODE)], ScalerConfig())


def test_a_model_that_may_have_no_replica_is_refused() -> None:
    with pytest.raises(ConfigError, match="no pool of 'm' may have a replica"):
        ScalerCore([limits(Role.DECODE, 0, 0, 0)], ScalerConfig())


def test_limits_know_their_pool() -> None:
    assert limits(Role.DECODE).key == DECODE
