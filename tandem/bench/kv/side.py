"""One side (writer or reader) of a store under test: a process that obeys one JSON object a line on stdin and answers with one.

Standard library and numpy only, so that a peer in another environment's interpreter runs it too. Times what the calls take and nothing
else: keys, views and outcomes are made ready before and looked at after.
"""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tandem.bench.kv.fresh_rows import FreshRows
from tandem.bench.kv.span import Span

Calls = list[Callable[[], Any]]


class Adapter(Protocol):
    """A store as a side uses it."""

    buffer: NDArray[np.uint8]

    def open(self, store: str, settings: dict[str, Any]) -> None:
        """Opens a store by that name; nothing where there is only one."""

    def puts(self, span: Span) -> Calls:
        """One call a batch, made ready to be timed."""

    def bad_puts(self, outcomes: Sequence[Any], span: Span) -> int:
        """Blocks that were not stored anew."""

    def gets(self, span: Span) -> Calls:
        """One call a batch, each copying into the buffer."""

    def bad_gets(self, outcomes: Sequence[Any], span: Span) -> int:
        """Blocks that did not come."""

    def lookup(self, numbers: Sequence[int], store: str) -> Callable[[], list[bool]]:
        """A call that tells which of these keys are held."""

    def drop(self, span: Span) -> None:
        """Takes the blocks out, untimed."""

    def shut(self, store: str) -> None:
        """Closes a store."""


class Answerer(Protocol):
    """What obeys commands."""

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carries out one command."""


class Side:
    """What the commands do with an adapter."""

    def __init__(self, adapter: Adapter, seed: int) -> None:
        self._adapter = adapter
        self._rows = FreshRows(adapter.buffer, seed)

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carries out one command."""
        span = Span(**command["span"]) if "span" in command else None
        match command["do"], span:
            case "open", _:
                self._adapter.open(command["store"], command["settings"])
            case "shut", _:
                self._adapter.shut(command["store"])
            case "fill", _:
                self._rows.fill(command["stamp"])
            case "put", Span():
                return _timed(self._adapter.puts(span), lambda found: self._adapter.bad_puts(found, span), command)
            case "get", Span():
                return _timed(self._adapter.gets(span), lambda found: self._adapter.bad_gets(found, span), command)
            case "verify", Span():
                return {"bad": self._rows.wrong_blocks(command["stamp"], span.blocks, span.block_bytes)}
            case "drop", Span():
                self._adapter.drop(span)
            case "lookup", _:
                return self._lookup(command)
            case _:
                raise ValueError(f"no such command: {command['do']}")
        return {}

    def _lookup(self, command: dict[str, Any]) -> dict[str, Any]:
        """Every other key is held. `bad`: answers that were wrong, of all calls."""
        pairs = [(command["held_first"] + index, command["absent_first"] + index) for index in range(command["keys"] // 2)]
        call = self._adapter.lookup([number for pair in pairs for number in pair], command["store"])
        expected = [True, False] * len(pairs)
        return _timed(
            [call] * command["calls"],
            lambda found: sum(wanted != got for held in found for wanted, got in zip(expected, held, strict=True)),
            {"calls_s": True},
        )


def _timed(calls: Calls, count_bad: Callable[[list[Any]], int], command: dict[str, Any]) -> dict[str, Any]:
    """`at_s`: the moment of the monotonic clock, which all processes share, to begin at. `calls_s`: the time of every call is wanted."""
    outcomes: list[Any] = []
    ends_s: list[float] = []
    time.sleep(max(0.0, command.get("at_s", 0.0) - time.monotonic()))
    begin_s = time.monotonic()
    if command.get("calls_s"):
        for call in calls:
            outcomes.append(call())
            ends_s.append(time.monotonic())
    else:
        outcomes = [call() for call in calls]
    end_s = time.monotonic()
    calls_s = [end - begin for begin, end in zip([begin_s, *ends_s], ends_s, strict=False)]
    return {"begin_s": begin_s, "end_s": end_s, "calls_s": calls_s, "bad": count_bad(outcomes)}


def prefaulted(buffer_bytes: int) -> NDArray[np.uint8]:
    """A buffer whose pages are there."""
    return np.full(buffer_bytes, 1, np.uint8)


def run_side(make: Callable[[dict[str, Any]], tuple[Answerer, dict[str, Any]]]) -> None:
    """Serves until stdin ends. The first line is what `make` gets; its second result goes into the first answer.

    What libraries print goes to stderr. An error ends the side after it has been answered.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the bench's own end ends us
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side: Answerer | None = None
    gc.disable()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if side is None:
                side, facts = make(command)
                answer = {"ready": True, **facts}
            else:
                answer = side.answer(command)
        except Exception as error:  # a root: what it was is for the bench to say
            answer = {"error": f"{type(error).__name__}: {error}", "is_missing": isinstance(error, ModuleNotFoundError)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "error" in answer:
            raise SystemExit(1)
        gc.collect()
