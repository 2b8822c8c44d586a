"""The log of the disk tier: where each block is, appending, and what goes when room is needed.

The oldest segment goes; what was used since it was written is appended once more before that, as far as it is half of the segment.
Not safe for threads but for `index`, which may be read at any time.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kv_transfer.blocks import BlockKey
from kv_transfer.codec import HEADER_BYTES, is_intact, pack_header
from kv_transfer.disk_segments import Buffer, Segment, SegmentFolder, SegmentReader
from tandem.domain import BlockHash, Namespace

_SEGMENT_BYTES = 64 << 20
_MIN_SEGMENTS = 16  # of a small store: what goes at once is a sixteenth of it
_WRITE_BYTES = 8 << 20
_WRITE_BLOCKS = 512  # two buffers each, of the kernel's 1,024
_NAMESPACE_BYTES = 16
_MAX_FREED_FOR_OTHERS = 2  # segments at once: some file systems count what is deleted as free much later


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """Where a block is. `used_s` is the time of its last get since it was written, or 0."""

    segment: Segment
    offset_bytes: int
    payload_bytes: int
    used_s: float = 0.0
    leased_until_s: float = 0.0

    @property
    def record_bytes(self) -> int:
        """What it takes on the disk."""
        return HEADER_BYTES + self.payload_bytes


class DiskLog:
    """The blocks in `folder`. While a segment goes the files may take half of one more than `capacity_bytes`.

    Raises ConfigError where the folder cannot be used, another process has it, or it is of another format.
    """

    def __init__(self, folder: Path, *, capacity_bytes: int) -> None:
        self.index: dict[bytes, Entry] = {}  # by namespace (16 bytes) and hash (32)
        self.capacity_bytes = capacity_bytes
        self._files = SegmentFolder(folder, segment_bytes=min(_SEGMENT_BYTES, capacity_bytes // _MIN_SEGMENTS))
        for segment, record in self._files.load():
            if record.is_dropped:
                continue
            if record.key in self.index:  # it was being moved when the process ended
                self.drop(record.key)
            segment.keys.append(record.key)
            self.index[record.key] = Entry(segment=segment, offset_bytes=record.offset_bytes, payload_bytes=record.payload_bytes)

    @property
    def used_bytes(self) -> int:
        """Size of the files, dropped blocks included until their segment goes."""
        return self._files.used_bytes

    @property
    def lost_bytes(self) -> int:
        """What was cut off when it was opened: half a block at an end, or all that is behind a header that does not hold."""
        return self._files.lost_bytes

    def append(self, blocks: Sequence[tuple[bytes, memoryview]]) -> int:
        """Appends new blocks (key, payload; all of one size); how many of them, the leading ones. 0: no room. Raises OSError."""
        payload_bytes = len(blocks[0][1])
        some = blocks[: self._make_space(HEADER_BYTES + payload_bytes)]
        if not some:
            return 0
        buffers: list[Buffer] = []
        for key, payload in some:
            buffers += (pack_header(block_key(key), payload), payload)
        segment, offset = self._files.append([key for key, _ in some], buffers)
        for key, _ in some:
            self.index[key] = Entry(segment=segment, offset_bytes=offset, payload_bytes=payload_bytes)
            offset += HEADER_BYTES + payload_bytes
        return len(some)

    def _make_space(self, record_bytes: int) -> int:
        """How many such records can be appended in one go, evicting others for it; 0 where there is no room. Raises OSError."""
        files = self._files
        if record_bytes > self.capacity_bytes:
            return 0
        while files.used_bytes + record_bytes > self.capacity_bytes:
            if self.evict() is None:
                return 0
        if not files.active_bytes or files.active_bytes + record_bytes > files.segment_bytes:
            for _ in range(_MAX_FREED_FOR_OTHERS):
                if files.free_bytes() >= max(files.segment_bytes, record_bytes) or self.evict() is None:
                    break
        left_bytes = files.segment_bytes - files.active_bytes
        if left_bytes < record_bytes:
            left_bytes = files.segment_bytes
        fitting = min(left_bytes, self.capacity_bytes - files.used_bytes, _WRITE_BYTES) // record_bytes
        return min(max(fitting, 1), _WRITE_BLOCKS)

    def evict(self) -> int | None:
        """Lets the oldest segment go that is not mostly leased; how many blocks went, None where there is none. Raises OSError."""
        now_s = time.monotonic()
        for segment in self._files.segments.values():
            held = {key: entry for key in segment.keys if (entry := self.index.get(key)) is not None and entry.segment is segment}
            kept = {key: entry for key, entry in held.items() if entry.leased_until_s > now_s}
            left_bytes = segment.end_bytes // 2 - sum(entry.record_bytes for entry in kept.values())
            if left_bytes >= 0:
                break
        else:
            return None
        used = [(key, entry) for key, entry in held.items() if entry.used_s and key not in kept]
        for key, entry in sorted(used, key=lambda item: -item[1].used_s):
            left_bytes -= entry.record_bytes
            if left_bytes < 0:
                break
            kept[key] = entry
        self._files.seal_if(segment)
        moved = self._append_again(kept)
        self.lose(segment)
        return len(held) - moved

    def _append_again(self, kept: Mapping[bytes, Entry]) -> int:
        """Appends blocks of a segment that goes; how many. Where the disk takes or gives no more the others go with it."""
        moved = 0
        with SegmentReader() as reader:
            for key, entry in sorted(kept.items(), key=lambda item: item[1].offset_bytes):
                stored = memoryview(bytearray(entry.record_bytes))
                try:
                    reader.read(entry.segment, entry.offset_bytes, [stored])
                    if not is_intact(block_key(key), bytes(stored[:HEADER_BYTES]), stored[HEADER_BYTES:]):
                        continue
                    segment, offset = self._files.append([key], [stored])
                except OSError:
                    break
                leased_until_s = entry.leased_until_s
                self.index[key] = Entry(
                    segment=segment, offset_bytes=offset, payload_bytes=entry.payload_bytes, leased_until_s=leased_until_s
                )
                moved += 1
        return moved

    def drop(self, key: bytes, expected: Entry | None = None) -> bool:
        """Forgets a block, if it is still the expected one, and sees to it that it does not come back; whether it was there."""
        entry = self.index.get(key)
        if entry is None or (expected is not None and entry is not expected):
            return False
        del self.index[key]
        self._files.bury(entry.segment, entry.offset_bytes, key, entry.payload_bytes)
        return True

    def lose(self, segment: Segment) -> None:
        """Deletes a segment and forgets what is in it. Raises OSError where its file cannot be deleted; all is there still then."""
        self._files.remove(segment)
        for key in segment.keys:
            entry = self.index.get(key)
            if entry is not None and entry.segment is segment:
                del self.index[key]

    def close(self) -> None:
        """Lets another process use the folder. Blocks stay; here there are none any more."""
        self.index.clear()
        self._files.close()


def block_key(key: bytes) -> BlockKey:
    """A key of the index as others name it."""
    return BlockKey(Namespace(key[:_NAMESPACE_BYTES].hex()), BlockHash(key[_NAMESPACE_BYTES:]))
