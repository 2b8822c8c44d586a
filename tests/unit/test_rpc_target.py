"""How a list of routers is told to gRPC, which takes lists of numbers only."""

import pytest

from tandem.rpc import _target


@pytest.mark.parametrize("address", ["router-0:8470", "127.0.0.1:8470", "[::1]:8470"])
def test_one_address_is_left_to_grpc(address: str) -> None:
    assert _target(address) == address


def test_several_addresses_become_one_list() -> None:
    assert _target("127.0.0.1:1,127.0.0.2:2,127.0.0.1:3") == "ipv4:127.0.0.1:1,127.0.0.2:2,127.0.0.1:3"


def test_names_are_looked_up() -> None:
    assert _target("localhost:1,127.0.0.2:2") == "ipv4:127.0.0.1:1,127.0.0.2:2"


def test_ipv6_addresses_become_one_list() -> None:
    assert _target("[::1]:1,[::2]:2") == "ipv6:[::1]:1,[::2]:2"


def test_what_cannot_be_looked_up_is_left_out() -> None:
    assert _target("a..b:1,127.0.0.2:2") == "ipv4:127.0.0.2:2"


def test_where_nothing_can_be_looked_up_grpc_says_so_of_the_first() -> None:
    assert _target("a..b:1,c..d:2") == "a..b:1"
