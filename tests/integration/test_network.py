"""What a process listens on and what others are told."""

import ipaddress

import pytest

from tandem.network import advertised_host, is_loopback

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("host", "is_so"), [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("node-1", False)]
)
def test_loopback_is_what_only_this_machine_reaches(host: str, is_so: bool) -> None:
    assert is_loopback(host) is is_so


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.7", "node-1"])
def test_an_address_of_its_own_is_told_as_it_is(host: str) -> None:
    assert advertised_host(host) == host


def test_who_listens_everywhere_is_told_by_an_address_that_can_be_reached() -> None:
    assert not ipaddress.ip_address(advertised_host("0.0.0.0")).is_unspecified
