"""A recorded core's log: what replays, what does not, and what is said of a file that is no log."""

import inspect
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from router.config import RouterConfig
from router.core import RouterCore
from router.event_log import EventLogError, encode_header
from router.event_writer import EventLogFile
from router.instructions import Reject
from router.recorder import RecordedCore
from router.replay import main, replay
from tandem.domain import ModelId, Receipt, Role, Sampling, StructuredKind, StructuredOutput
from tandem.errors import ConfigError, EngineError, InvalidRequestError
from tests.core_talk import HANDING_OFF, R1, only_dispatch, submit
from tests.event_logs import Recording
from tests.samples import make_lease

READS = {"shares", "fleet", "queued_requests", "running_requests", "is_served", "waiting_work", "prefixes", "check_invariants"}


def recorded() -> Recording:
    """Two replicas, one request that fails once and ends, one of an id in use, one for nobody."""
    recording = Recording(HANDING_OFF)
    core = recording.core
    for name in ("prefill-0", "decode-0", "decode-1"):
        core.replica_seen(make_lease(name, Role(name.split("-")[0])), 0.0)
    dispatch = only_dispatch(submit(core, deadline_s=9.0))
    with pytest.raises(InvalidRequestError):
        submit(core)
    core.tokens(R1, dispatch.attempt, 2, 0.5)
    again = only_dispatch(core.failed(R1, dispatch.attempt, EngineError("died"), 0.6))
    core.finished(R1, again.attempt, Receipt(request_id=R1, prefill_s=0.1, ttft_s=0.2, e2e_s=1.0, output_tokens=16), 1.0)
    core.cancelled(R1, 1.0)
    assert isinstance(submit(core, "r2", model="nobody")[0], Reject)
    core.models_held([ModelId("x")], {})
    assert core.retry_after_s(ModelId("m"), 1.0) > 0
    assert len(core.replicas(1.0)) == 3
    core.tick(1.1)
    return recording


def test_the_same_events_have_the_same_answers(tmp_path: Path) -> None:
    recording = recorded()
    found = recording.replayed(tmp_path)
    assert (found.difference, found.is_cut_off, found.events) == (None, False, 14)
    assert found.header == recording.header
    assert found.end_bytes == len(recording.content)


def test_every_event_of_the_core_is_recorded() -> None:
    public = {name for name, _ in inspect.getmembers(RouterCore, lambda item: callable(item) or isinstance(item, property))}
    events = {name for name in public if not name.startswith("_")} - READS
    assert {name for name in events if name not in vars(RecordedCore)} == set()


def test_the_first_other_answer_is_named(tmp_path: Path) -> None:
    recording = recorded()
    recording.header = replace(recording.header, seed=8)
    found = recording.replayed(tmp_path)
    assert found.difference is not None
    assert found.difference.number == found.events == 4
    assert found.difference.offset_bytes == len(encode_header(recording.header)) + sum(map(len, recording.kept.records[:3]))
    old, new = found.difference.recorded, found.difference.replayed
    assert isinstance(old, list)
    assert isinstance(new, list)
    assert old[0].pop("plan") != new[0].pop("plan")  # its id is drawn
    assert old == new == [{"request_id": "r1", "attempt": 1}]


def test_a_core_that_raises_is_recorded_as_it_is(tmp_path: Path) -> None:
    recording = Recording()
    del recording.core._turns
    with pytest.raises(AttributeError):
        recording.core.replica_seen(make_lease(), 0.0)
    found = recording.replayed(tmp_path).difference
    assert found is not None
    assert found.replayed == []
    assert isinstance(found.recorded, dict)
    assert found.recorded["raised"] == "AttributeError"


def test_nothing_of_a_prompt_is_in_a_log() -> None:
    recording = Recording()
    grammar = StructuredOutput(kind=StructuredKind.CHOICE, value=("secret choice",))
    sampling = Sampling(max_tokens=3, stop=("secret stop",), logit_bias={77777: 1.0}, structured_output=grammar)
    recording.core.replica_seen(make_lease(), 0.0)
    submit(recording.core, prompt_token_ids=(77777,) * 50, cache_salt="secret salt", sampling=sampling)
    assert b"secret" not in recording.content
    assert msgspec.msgpack.encode(77777) not in recording.content
    assert b"decode-0" in recording.content


@pytest.mark.parametrize("lost_bytes", [1, 7, 9])
def test_a_log_without_its_last_bytes_replays_up_to_there(tmp_path: Path, lost_bytes: int) -> None:
    recording = recorded()
    path = tmp_path / "log"
    path.write_bytes(recording.content[:-lost_bytes])
    found = replay(path)
    assert (found.difference, found.is_cut_off, found.events) == (None, True, 13)
    assert found.end_bytes == len(recording.content) - len(recording.kept.records[-1])


def test_a_log_that_lost_all_but_a_part_of_a_frame_is_cut_off(tmp_path: Path) -> None:
    recording = recorded()
    path = tmp_path / "log"
    path.write_bytes(recording.content[: 3 - len(recording.kept.records[-1])])
    assert replay(path).is_cut_off


def damaged() -> list[tuple[str, bytes, str]]:
    recording = recorded()
    whole, header = recording.content, len(encode_header(recording.header))
    config = msgspec.msgpack.decode(whole[24:header])
    config["config"]["max_frobnications"] = 3
    renamed = msgspec.msgpack.encode(config)
    old = whole[:16] + struct.pack("<II", len(renamed), zlib.crc32(renamed)) + renamed
    odd = msgspec.msgpack.encode(7)
    return [
        ("empty", b"", "no event log of a router (at byte 0)"),
        ("text", b"2026-01-01 INFO router ready\n", "no event log of a router (at byte 0)"),
        ("another format", b"TANDEM EVENTS 2\n" + whole[16:], "another format (at byte 0)"),
        ("no header", whole[:16], "no header (at byte 16)"),
        ("half a header", whole[: header - 5], "no header (at byte 16)"),
        ("a header of nothing", whole[:16] + struct.pack("<II", len(odd), zlib.crc32(odd)) + odd, "not one of this version"),
        ("another setting", old, "differ in settings: max_frobnications"),
        ("a flipped bit", whole[: header + 20] + bytes([whole[header + 20] ^ 1]) + whole[header + 21 :], f"(at byte {header})"),
        ("a huge record", whole[:header] + b"\xff" * 40, f"of 4294967295 bytes (at byte {header})"),
        ("no event", whole[:header] + struct.pack("<II", len(odd), zlib.crc32(odd)) + odd, "no event of this version"),
    ]


@pytest.mark.parametrize(("content", "words"), [pytest.param(content, words, id=name) for name, content, words in damaged()])
def test_what_is_wrong_with_a_file_is_said_with_its_offset(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(EventLogError) as caught:
        replay(path)
    assert words in caught.value.message
    assert main([str(path)]) == 2


def test_the_command_says_how_it_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = recorded()
    path = tmp_path / "log"
    path.write_bytes(recording.content)
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == "14 events, the same answers\n"
    recording.header = replace(recording.header, seed=8, code="other")
    path.write_bytes(recording.content[:-3])
    assert main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "event 4 (at byte " in out
    assert "recorded by version" in out
    recording.header = replace(recording.header, seed=7)
    path.write_bytes(recording.content[:-3])
    assert main([str(path)]) == 0
    assert "cut off after byte" in capsys.readouterr().out


def test_a_log_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        replay(tmp_path / "none")


# The file.


def test_a_log_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "log"
    first, second = EventLogFile(path, b"one"), EventLogFile(path, b"two")
    first.close()
    second.close()
    assert (path.read_bytes(), (tmp_path / "folder" / "log.1").read_bytes()) == (b"one", b"two")
    assert second.path.name == "log.1"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_log_ends_whole_at_its_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLogFile(tmp_path / "log", b"head", max_bytes=10)
    for record in (b"aaaa", b"bbbb", b"c"):
        log.add(record)
    log.close()
    assert (tmp_path / "log").read_bytes() == b"headaaaa"
    assert [record.getMessage().split()[0] for record in caplog.records if record.levelname == "WARNING"] == ["event_log_ended"]


def test_a_log_that_the_disk_does_not_keep_up_with_ends(tmp_path: Path) -> None:
    log = EventLogFile(tmp_path / "log", b"head")
    for _ in range(40):
        log.add(bytes(2**20))
    assert not log.is_open
    log.close()
    assert (tmp_path / "log").stat().st_size == 4 + 31 * 2**20


def test_a_full_disk_ends_the_log(tmp_path: Path) -> None:
    log = EventLogFile(tmp_path / "log", b"head")
    os.close(log._descriptor)
    log._descriptor = os.open("/dev/full", os.O_WRONLY)
    log.add(b"more")
    log.close()
    assert not log.is_open


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write the event log"):
        EventLogFile(tmp_path / "file" / "log", b"")


def test_nothing_is_encoded_once_the_log_has_ended() -> None:
    recording = Recording(RouterConfig())
    recording.kept.is_open = False
    recording.core.tick(1.0)
    assert recording.kept.records == []
