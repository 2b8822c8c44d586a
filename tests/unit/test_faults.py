"""Fault hooks do what their specification says, and nothing without one."""

import pytest

from tandem.errors import ConfigError
from tandem.faults import SITES, Faults


def test_without_a_specification_nothing_happens() -> None:
    faults = Faults.parse("")
    assert faults.delay_s("kv_publish.delay_s") == 0.0
    assert not any(faults.fires("prefill.fail_every") for _ in range(10))


def test_a_delay_is_the_same_at_each_pass() -> None:
    faults = Faults.parse("kv_publish.delay_s=0.25")
    assert [faults.delay_s("kv_publish.delay_s") for _ in range(2)] == [0.25, 0.25]


def test_every_nth_pass_is_hit() -> None:
    faults = Faults.parse("kv_put.drop_every=3")
    assert [faults.fires("kv_put.drop_every") for _ in range(7)] == [False, False, True, False, False, True, False]


def test_sites_are_counted_apart() -> None:
    faults = Faults.parse("kv_put.drop_every=2,prefill.fail_every=1")
    assert faults.fires("prefill.fail_every")
    assert not faults.fires("kv_put.drop_every")
    assert faults.fires("kv_put.drop_every")


@pytest.mark.parametrize("site", SITES)
def test_every_site_can_be_named(site: str) -> None:
    Faults.parse(f"{site}=1")


def test_an_unknown_site_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"no site 'kv_put'; valid are kv_publish\.delay_s, kv_put\.drop_every"):
        Faults.parse("kv_put=1")


@pytest.mark.parametrize("value", ["", "x", "0", "-1", "nan", "inf", "1=2"])
@pytest.mark.parametrize("site", SITES)
def test_a_value_that_is_no_number_above_zero_is_refused(site: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{site} takes a"):
        Faults.parse(f"{site}={value}")


def test_a_count_must_be_whole() -> None:
    with pytest.raises(ConfigError, match=r"'prefill\.fail_every=0\.5'; prefill\.fail_every takes a whole number above 0"):
        Faults.parse("prefill.fail_every=0.5")
