"""Notices that an engine hangs: its process is stopped, or requests run and no step of theirs has ended for a long time.

Must not end the replica: its caller does, and its supervisor starts it again. Looks once a second, at /proc only while requests run.
"""

from dataclasses import dataclass
from typing import Protocol

from tandem.engine.base import Engine
from tandem.hang import LOOK_S, HangJudge, try_look
from tandem.polling import poll_until

_STOPPED_LOOKS = 2  # whoever asks for tokens waits
_COMPUTING_FRACTION = 0.1  # of a core, from which on the engine computes
_COMPUTING_WEIGHT = 0.1  # a step of 2,048 tokens of a model of 7 billion takes a CPU minutes, and it must not be ended again and again


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePulse:
    """An engine's signs of life: its processes, whether requests run in it, how many steps have ended so far."""

    pids: tuple[int, ...]
    is_busy: bool
    steps: int


class WatchedEngine(Engine, Protocol):
    """An engine that shows its pulse."""

    @property
    def pulse(self) -> EnginePulse:
        """Now; costs next to nothing."""


class EngineJudge:
    """Judges by one pulse a second. `ticks_per_s` is the kernel's (os.sysconf("SC_CLK_TCK"))."""

    def __init__(self, step_timeout_s: float, ticks_per_s: int) -> None:
        self._step_timeout_s = step_timeout_s
        self._computing_ticks = _COMPUTING_FRACTION * ticks_per_s * LOOK_S
        self._stops = HangJudge(stopped_looks=_STOPPED_LOOKS, silent_looks=1)
        self._steps: int | None = None  # at the last look, None where it was idle then
        self._ticks = 0
        self._quiet_s = 0.0

    def judge(self, pulse: EnginePulse) -> str:
        """Takes one look in; what the engine did where it hangs, to follow its name in a sentence, else ""."""
        if not pulse.is_busy:
            self._steps = None
            return ""
        looks = [look for pid in pulse.pids if (look := try_look(pid)) is not None]
        ticks = sum(look.cpu_ticks for look in looks)
        if pulse.steps != self._steps:
            self._quiet_s = 0.0
        else:
            self._quiet_s += LOOK_S * (_COMPUTING_WEIGHT if ticks - self._ticks >= self._computing_ticks else 1.0)
        self._steps, self._ticks = pulse.steps, ticks
        if why := self._stops.judge(is_stopped=any(look.is_stopped for look in looks), is_silent=False):
            return why
        return f"has ended no step for {self._step_timeout_s:g} s" if self._quiet_s >= self._step_timeout_s else ""


async def until_hung(engine: WatchedEngine, judge: EngineJudge, look_s: float = LOOK_S) -> str:
    """Returns when the engine hangs, with what it did."""
    return await poll_until(lambda: judge.judge(engine.pulse) or None, look_s)
