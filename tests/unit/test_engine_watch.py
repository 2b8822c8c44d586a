"""When an engine hangs, by its pulse. The state of its process is in tests/integration/test_hangs.py."""

from tandem.engine_watch import EngineJudge, EnginePulse, until_hung
from tests.fake_engine import FakeEngine


def pulse(steps: int, *, is_busy: bool = True) -> EnginePulse:
    return EnginePulse(pids=(), is_busy=is_busy, steps=steps)


def words(judge: EngineJudge, *pulses: EnginePulse) -> list[str]:
    return [judge.judge(each) for each in pulses]


def test_an_engine_that_ends_steps_lives() -> None:
    assert words(EngineJudge(1.0, 100), *map(pulse, range(5))) == [""] * 5


def test_requests_without_the_end_of_a_step_for_the_time_allowed_are_a_hang() -> None:
    assert words(EngineJudge(2.0, 100), pulse(7), pulse(7), pulse(7)) == ["", "", "has ended no step for 2 s"]


def test_an_idle_engine_needs_no_steps_and_its_next_request_has_all_its_time() -> None:
    idle = pulse(7, is_busy=False)
    assert words(EngineJudge(2.0, 100), pulse(7), pulse(7), idle, idle, pulse(7), pulse(7)) == [""] * 6


class Stuck(FakeEngine):
    """Has a request and makes no step."""

    @property
    def pulse(self) -> EnginePulse:
        return pulse(0)


async def test_a_hang_is_told_once_it_is_one() -> None:
    assert await until_hung(Stuck(), EngineJudge(3.0, 100), look_s=0.0) == "has ended no step for 3 s"
