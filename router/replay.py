"""`python -m router.replay PATH`: gives a recorded router's events to a fresh core and compares what it answers with what was answered.

Must not change the log. Exit status: 0 all the same, 1 a difference, 2 the file cannot be read as a log of this version.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from router.block_probe_library import load_probe
from router.core import RouterCore
from router.core_events import CoreEvent
from router.event_log import Entry, LogHeader, LogReader, describe_answer, encode_answer
from tandem import __version__
from tandem.errors import ConfigError, TandemError
from tandem.fingerprint import code_fingerprint

_EXIT_DIFFERENCE = 1
_EXIT_ERROR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first event, counted from 1, that this core answers in another way. Answers as `describe_answer` has them."""

    number: int
    offset_bytes: int
    event: CoreEvent
    recorded: object
    replayed: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a log holds and how it replays; `events` were compared, up to the difference where there is one."""

    header: LogHeader
    events: int
    end_bytes: int  # of the last whole record
    is_cut_off: bool  # half a record follows: the router was killed, or writes still
    difference: Difference | None = None


def replay(path: Path) -> Replay:
    """All of a log, or to the first difference. Raises ConfigError for a file that cannot be opened, EventLogError for a bad one."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    with file:
        reader = LogReader(file)
        header = reader.read_header()
        core, events, difference = RouterCore(header.config, Random(header.seed), weights=header.weights, bind_probe=load_probe()), 0, None
        for entry in reader.entries():
            events += 1
            difference = _compared(core, entry, events)
            if difference is not None:
                break
    return Replay(header=header, events=events, end_bytes=reader.offset_bytes, is_cut_off=reader.is_cut_off, difference=difference)


def _compared(core: RouterCore, entry: Entry, number: int) -> Difference | None:
    answer: object
    try:
        answer = entry.event.apply(core)
    except Exception as error:  # as the recorded core may have raised
        answer = error
    replayed = encode_answer(answer)
    if replayed == entry.answer:
        return None
    return Difference(
        number=number,
        offset_bytes=entry.offset_bytes,
        event=entry.event,
        recorded=describe_answer(entry.answer),
        replayed=describe_answer(replayed),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Replays one log and says how it went; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m router.replay", description="Has a router decide again as its event log says it did.")
    parser.add_argument("path", type=Path, help="what `python -m router --event-log PATH` wrote")
    options = parser.parse_args(arguments)
    try:
        found = replay(options.path)
    except TandemError as error:
        print(f"replay: {options.path}: {error.message}", file=sys.stderr)
        return _EXIT_ERROR
    if found.header.code != code_fingerprint():
        recorded_by = f"{found.header.version} ({found.header.code})"
        print(f"recorded by version {recorded_by}, replayed by {__version__} ({code_fingerprint()}): they may differ on purpose")
    if found.is_cut_off:
        print(f"the log is cut off after byte {found.end_bytes}: its last record is not all there")
    if found.difference is None:
        print(f"{found.events} events, the same answers")
        return 0
    difference = found.difference
    print(f"event {difference.number} (at byte {difference.offset_bytes}) has another answer")
    print(f"  event     {difference.event}\n  recorded  {difference.recorded}\n  replayed  {difference.replayed}")
    return _EXIT_DIFFERENCE


if __name__ == "__main__":
    raise SystemExit(main())
