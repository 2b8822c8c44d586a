"""Event logs in memory: what a recorded core wrote, as the file that a router would leave."""

from pathlib import Path

from router.config import RouterConfig
from router.event_log import LogHeader, encode_header
from router.recorder import RecordedCore, new_header
from router.replay import Replay, replay


class KeptRecords:
    """Records in a list."""

    def __init__(self) -> None:
        self.is_open = True
        self.records: list[bytes] = []

    def add(self, record: bytes) -> None:
        """The next one."""
        self.records.append(record)


class Recording:
    """A recorded core, `core`, and what it wrote."""

    def __init__(self, config: RouterConfig | None = None, *, seed: int = 7) -> None:
        self.header: LogHeader = new_header(RouterConfig() if config is None else config, weights={"y": 3.0}, seed=seed)
        self.kept = KeptRecords()
        self.core = RecordedCore(self.header, self.kept)

    @property
    def content(self) -> bytes:
        """The whole file."""
        return encode_header(self.header) + b"".join(self.kept.records)

    def replayed(self, folder: Path) -> Replay:
        """By a fresh core, from a file in `folder`."""
        path = folder / "router.events"
        path.write_bytes(self.content)
        return replay(path)
