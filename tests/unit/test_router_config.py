"""A setting that makes no sense is refused by name."""

from typing import Any

import pytest

from router.config import RouterConfig
from tandem.errors import ConfigError


def test_the_defaults_are_valid() -> None:
    RouterConfig().validate()
    RouterConfig(handoff_min_tokens=0).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_queued_requests", 0), ("retry_budget", -1), ("tick_s", 0.0), ("watch_silence_s", float("nan")), ("handoff_min_tokens", -1)],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        RouterConfig(**{name: value}).validate()
