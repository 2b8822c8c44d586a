"""A replica's link to its engine's connector: settings on the way there, notices on the way back.

Knows neither the engine's nor the store's inside.
"""

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path

from kv_transfer.notices import Notice, NoticeReceiver
from kv_transfer.planner import KvDirective
from tandem.config import EngineConfig
from tandem.domain import Namespace
from tandem.engine.base import KvLoaded, KvTotals

_CONNECTOR = ("TandemConnector", "kv_transfer.connector")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorOptions:
    """What the replica tells its connector; travels as kv_connector_extra_config."""

    namespace: str
    store_dir: str
    store_capacity_bytes: int
    notice_path: str
    sync_load_bytes: int
    model_quota_bytes: int
    faults: str


class StoreLink:
    """`KvLink` over a Unix socket in `runtime_dir`. Construct it before the engine, `listen` once the loop runs."""

    def __init__(self, config: EngineConfig, namespace: Namespace, runtime_dir: Path, name: str) -> None:
        self._receiver = NoticeReceiver(runtime_dir / f"{name}.sock")
        self._options = ConnectorOptions(
            namespace=namespace,
            store_dir=config.store_dir,
            store_capacity_bytes=config.store_capacity_bytes,
            notice_path=str(self._receiver.path),
            sync_load_bytes=config.sync_load_bytes,
            model_quota_bytes=config.kv_store_bytes,
            faults=config.faults,
        )
        self._published: dict[str, asyncio.Future[int]] = {}
        self._loaded: dict[str, KvLoaded] = {}
        self._totals = KvTotals()

    def connector(self) -> tuple[str, str, dict[str, object]]:
        """Class name, module and settings of the connector."""
        return *_CONNECTOR, asdict(self._options)

    def run_params(self, run_id: str, *, load: bool, publish: bool, counts_use: bool = True) -> dict[str, str | bool]:
        """The run's kv_transfer_params; from here to `forget` its notices are kept."""
        self._published[run_id] = asyncio.get_running_loop().create_future()
        return KvDirective(tag=run_id, load=load, publish=publish, counts_use=counts_use).to_params()

    def listen(self) -> None:
        """Takes notices on the running loop."""
        self._receiver.listen(self._on_notice)

    def _on_notice(self, notice: Notice) -> None:
        self._totals = KvTotals(**asdict(notice.totals))
        published = self._published.get(notice.tag)
        if published is None:
            return
        if notice.kind == "loaded":
            self._loaded[notice.tag] = KvLoaded(local_tokens=notice.local_tokens, blocks=notice.blocks, payload_bytes=notice.payload_bytes)
        elif not published.done():
            published.set_result(notice.blocks)

    async def published(self, run_id: str, timeout_s: float) -> int:
        """Leading prompt blocks in the store once the run's last chunk was published; 0 after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._published[run_id])
        except TimeoutError:
            return 0

    def take_loaded(self, run_id: str) -> KvLoaded | None:
        """What the run loaded, once."""
        return self._loaded.pop(run_id, None)

    def forget(self, run_id: str) -> None:
        """Drops what is kept of a run."""
        future = self._published.pop(run_id, None)
        if future is not None:
            future.cancel()
        self._loaded.pop(run_id, None)

    def totals(self) -> KvTotals:
        """Transfer counts as of the last notice."""
        return self._totals

    def close(self) -> None:
        """Stops listening and removes the socket."""
        self._receiver.close()
