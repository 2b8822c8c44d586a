"""Which routers a client's next call goes to."""

import pytest

from tandem.router_channels import RouterChannels


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make(endpoint: str = "a:1") -> tuple[RouterChannels[str], Clock]:
    clock = Clock()
    return RouterChannels(endpoint, lambda target: f"to {target}", clock), clock


def test_one_channel_serves_all_calls() -> None:
    channels, _ = make("a:1,b:2")
    assert channels.current == channels.current == "to a:1,b:2"
    assert channels.opened == ["to a:1,b:2"]


def test_after_a_loss_calls_go_to_those_learned_of_too() -> None:
    channels, _ = make()
    assert channels.current == "to a:1"
    channels.learn("a:1,b:2,c:3")
    assert channels.current == "to a:1"
    channels.lost()
    assert channels.current == "to a:1,b:2,c:3"
    assert channels.opened == ["to a:1", "to a:1,b:2,c:3"]


@pytest.mark.parametrize("said", ["", "a:1"])
def test_who_knows_of_no_other_stays_where_it_is(said: str) -> None:
    channels, _ = make()
    channels.learn(said)
    channels.lost()
    assert channels.current == "to a:1"
    assert len(channels.opened) == 1


def test_it_asks_again_after_a_while() -> None:
    channels, clock = make()
    assert channels.wants_to_learn
    channels.learn("")
    assert not channels.wants_to_learn
    clock.now_s = 10.5
    assert channels.wants_to_learn
