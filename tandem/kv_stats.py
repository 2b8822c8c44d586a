"""What the KV stores of a cluster hold, asked of each node's store service. Must not change anything."""

import asyncio
from dataclasses import asdict, dataclass

from rich.table import Table

from tandem.client import AsyncClient
from tandem.cluster_view import ClusterStatus
from tandem.errors import TandemError
from tandem.rpc import call, open_channel
from tandem.v1 import store_pb2
from tandem.wire import from_message

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One tier of one node. Totals count since its store service started."""

    tier: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    hits_total: int
    misses_total: int
    corrupt_total: int
    evicted_total: int
    promoted_total: int
    demoted_total: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStore:
    """One node's store; `error` says why nothing is known of it."""

    address: str
    node: str = ""
    tiers: tuple[Tier, ...] = ()
    granted_slots: int = 0
    leased_blocks: int = 0
    leaked_slots: int = 0
    is_native: bool = False
    error: str = ""


def kv_stats(endpoint: str | None, *, timeout_s: float) -> list[NodeStore]:
    """Of every store service that the replicas name. Raises TandemError where the router does not answer."""
    return asyncio.run(_kv_stats(endpoint, timeout_s))


async def _kv_stats(endpoint: str | None, timeout_s: float) -> list[NodeStore]:
    async with AsyncClient(endpoint) as client:
        return await _stores(await client.status(timeout_s=timeout_s), timeout_s)


def store_troubles(status: ClusterStatus, *, timeout_s: float) -> list[str]:
    """What is wrong with the stores of these replicas, a line each. Everything is served all the same, by computing."""
    stores = asyncio.run(_stores(status, timeout_s))
    lines = [f"KV store at {store.address} does not answer: {store.error}" for store in stores if store.error]
    lines += [f"KV store of node {store.node}, {tier.tier}: {tier.error}" for store in stores for tier in store.tiers if tier.error]
    return lines


async def _stores(status: ClusterStatus, timeout_s: float) -> list[NodeStore]:
    addresses = sorted({replica.lease.store_address for replica in status.replicas} - {""})
    return await asyncio.gather(*(_node(address, timeout_s) for address in addresses))


async def _node(address: str, timeout_s: float) -> NodeStore:
    async with open_channel(address) as channel:
        try:
            answer = await call(
                channel, "tandem.v1.Store/Stat", store_pb2.StoreStatRequest(), store_pb2.StoreStatResponse, timeout_s=timeout_s
            )
        except TandemError as error:
            return NodeStore(address=address, error=error.message)
    tiers = tuple(from_message(Tier, tier) for tier in answer.tiers)
    return from_message(NodeStore, answer, address=address, tiers=tiers, error="")


def kv_stats_report(stores: list[NodeStore]) -> dict[str, object]:
    """As one JSON object."""
    return {"schema": "tandem.kv_stats/1", "nodes": [asdict(store) for store in stores]}


def kv_stats_table(stores: list[NodeStore]) -> Table:
    """For a terminal: a line for each tier."""
    table = Table(title="KV stores")
    for title in (
        "node",
        "tier",
        "used MiB",
        "of MiB",
        "blocks",
        "served",
        "up",
        "down",
        "evicted",
        "corrupt",
        "granted",
        "leased",
        "leaked",
    ):
        table.add_column(title, justify="left" if title in ("node", "tier") else "right")
    for store in stores:
        if store.error:
            table.add_row(store.address, store.error)
        for number, tier in enumerate(store.tiers):
            slots = (store.granted_slots, store.leased_blocks, store.leaked_slots) if number == 0 else ("", "", "")
            counts = (tier.blocks, tier.hits_total, tier.promoted_total, tier.demoted_total, tier.evicted_total, tier.corrupt_total)
            name = f"{tier.tier} ({tier.error})" if tier.error else tier.tier
            table.add_row(store.node, name, str(tier.used_bytes // _MIB), str(tier.capacity_bytes // _MIB), *map(str, (*counts, *slots)))
    return table
