"""A setting that makes no sense is refused by name."""

from typing import Any

import pytest

from router.config import RouterConfig
from tandem.errors import ConfigError


def test_the_defaults_are_valid() -> None:
    RouterConfig().validate()
    RouterConfig(handoff_min_tokens=0, one_worker_max_tokens=0, queue_ageing=0.0, ahead_s=0.0).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_queued_requests", 0),
        ("retry_budget", -1),
        ("max_prefill_candidates", 0),
        ("max_prefill_candidates", 17),
        ("tick_s", 0.0),
        ("watch_silence_s", float("nan")),
        ("default_ttft_s", 0.0),
        ("handoff_min_tokens", -1),
        ("one_worker_max_tokens", -1),
        ("queue_ageing", -0.1),
        ("ahead_s", -0.1),
        ("retry_hold_s", float("nan")),
    ],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        RouterConfig(**{name: value}).validate()


def test_a_policy_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"policy must be one of: .*predicted_ttft.*lmetric.*; got 'best'"):
        RouterConfig(policy="best").validate()
