"""The file that a router's events are written to: how records lie in it, and how they are read back.

Must not know what becomes of events: `recorder.py` makes them, `replay.py` gives them to a core.

    "TANDEM EVENTS 1\\n"   then records: length and CRC-32 of the payload (little-endian, 4 bytes each), payload (MessagePack)
    first record           `LogHeader`
    every other            the pair of an event and what the core answered
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import BinaryIO

import msgspec

from router.config import RouterConfig
from router.core_events import CoreEvent, error_facts, short_blocks
from router.instructions import CopyPrefix
from tandem.domain import BlockHash
from tandem.errors import ConfigError, Reason, TandemError
from tandem.short_hash import split

_MAGIC = b"TANDEM EVENTS 1\n"
_FRAME = struct.Struct("<II")
_MAX_RECORD_BYTES = 64 * 2**20  # a prompt of 2**21 blocks takes 16 MiB


class EventLogError(ConfigError):
    """The file is no event log, one of another format, or damaged; `offset_bytes` says where."""

    def __init__(self, message: str, offset_bytes: int) -> None:
        super().__init__(f"{message} (at byte {offset_bytes})", reason=Reason.BAD_BYTES)
        self.offset_bytes = offset_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHeader:
    """What a core is made of: the same again decides the same."""

    version: str  # of the program, and its fingerprint: another one may decide otherwise
    code: str
    begun_unix_s: float
    seed: int
    config: RouterConfig
    weights: dict[str, float]


@dataclass(frozen=True, slots=True)
class Entry:
    """One event; `answer` is what the core made of it, as `encode_answer` has it."""

    offset_bytes: int
    event: CoreEvent
    answer: bytes


class _Failure(msgspec.Struct, frozen=True):
    """The core raised instead of answering."""

    raised: str
    message: str


def _encode_foreign(value: object) -> object:
    if isinstance(value, TandemError):
        return error_facts(value)
    raise TypeError(f"an event log cannot have a {type(value).__name__}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_foreign)
_RECORD_DECODER = msgspec.msgpack.Decoder(tuple[CoreEvent, msgspec.Raw])


def encode_answer(answer: object) -> bytes:
    """The same bytes for the same instructions, floats to the last bit."""
    if isinstance(answer, Exception):
        return _ENCODER.encode(_Failure(type(answer).__name__, str(answer)))
    if isinstance(answer, list):
        answer = [_shortened(one) if isinstance(one, CopyPrefix) else one for one in answer]
    return _ENCODER.encode(answer)


def _shortened(copy: CopyPrefix) -> CopyPrefix:
    """With as much of each block's hash as events have."""
    return replace(copy, block_hashes=[BlockHash(block) for block in split(short_blocks(copy.block_hashes))])


def describe_answer(answer: bytes) -> object:
    """For people: plain lists, maps, numbers and strings."""
    found: object = msgspec.msgpack.decode(answer)
    return found


def encode_header(header: LogHeader) -> bytes:
    """The file's beginning."""
    return _MAGIC + _framed(_ENCODER.encode(header))


def encode_entry(event: CoreEvent, answer: object) -> bytes:
    """One record; about 5 us, and 10 us per KB."""
    return _framed(_ENCODER.encode((event, msgspec.Raw(encode_answer(answer)))))


def _framed(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


class LogReader:
    """Reads a log from its beginning, once. Raises EventLogError; at `read_header` where it is none of this format."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset_bytes = 0  # of the next record
        self.is_cut_off = False  # the last record is not all there: the router was killed, or is still writing

    def read_header(self) -> LogHeader:
        """The first record."""
        magic = self._file.read(len(_MAGIC))
        if magic != _MAGIC:
            kind = "an event log of another format" if magic.startswith(_MAGIC.split(b"1")[0]) else "no event log of a router"
            raise EventLogError(f"this is {kind}", 0)
        self.offset_bytes = len(_MAGIC)
        payload = self._next_payload()
        if payload is None:
            raise EventLogError("the log has no header", self.offset_bytes)
        try:
            plain = msgspec.msgpack.decode(payload)
            unknown = plain["config"].keys() ^ {field.name for field in fields(RouterConfig)}
            if unknown:
                raise EventLogError(f"this version and the log's differ in settings: {', '.join(sorted(unknown))}", len(_MAGIC))
            return msgspec.convert(plain, LogHeader)
        except (msgspec.MsgspecError, TypeError, KeyError, AttributeError) as error:
            raise EventLogError(f"the header is not one of this version: {error}", len(_MAGIC)) from error

    def entries(self) -> Iterator[Entry]:
        """After the header, to the end of the last whole record."""
        while True:
            begin = self.offset_bytes
            payload = self._next_payload()
            if payload is None:
                return
            try:
                event, answer = _RECORD_DECODER.decode(payload)
            except msgspec.MsgspecError as error:
                raise EventLogError(f"the record is no event of this version: {error}", begin) from error
            yield Entry(begin, event, bytes(answer))

    def _next_payload(self) -> bytes | None:
        frame = self._file.read(_FRAME.size)
        if len(frame) < _FRAME.size:
            self.is_cut_off = bool(frame)
            return None
        size, checksum = _FRAME.unpack(frame)
        if size > _MAX_RECORD_BYTES:
            raise EventLogError(f"the log is damaged: a record of {size} bytes", self.offset_bytes)
        payload = self._file.read(size)
        if len(payload) < size:
            self.is_cut_off = True
            return None
        if zlib.crc32(payload) != checksum:
            raise EventLogError("the log is damaged: a record's checksum is wrong", self.offset_bytes)
        self.offset_bytes += _FRAME.size + size
        return payload
