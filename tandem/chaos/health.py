"""Whether the platform is whole, and what it holds: processes, leases, each router's view, gauges, one probe. Must not change anything."""

import asyncio
import re
from collections import Counter
from collections.abc import Sequence

import aiohttp

from tandem.chaos.cluster import ChaosCluster
from tandem.chaos.signals import are_gone
from tandem.client import AsyncClient
from tandem.domain import ReplicaState, Role
from tandem.errors import TandemError
from tandem.membership import Member, MemberKind
from tandem.redis_register import RedisRegister

_ASK_S = 2.0
_PROBE_S = 15.0
_POLL_S = 0.25
_PROBE_PROMPT = (5, 6, 7, 8, 9, 10, 11, 12)
# What a request holds while it runs, and nothing afterwards.
_GAUGES = (
    *("tandem_router_queued_requests", "tandem_router_running_requests", "tandem_router_unowned_requests"),
    *("tandem_worker_running_requests", "tandem_worker_pending_prefill_tokens", "tandem_worker_kv_tokens"),
    "tandem_worker_unowned_requests",
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("tandem_store_leased_blocks", "tandem_store_leaked_slots", "tandem_store_granted_slots"),
)
_SAMPLE = re.compile(r"^([a-z:_]+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)


class Health:
    """Looks at one platform. `members` are those of the last look at the register that was answered."""

    def __init__(self, cluster: ChaosCluster) -> None:
        self._cluster = cluster
        self._register = RedisRegister(cluster.redis_url, cluster.id)
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_S))
        self._wanted = {Role.PREFILL: cluster.sizes["prefill"], Role.DECODE: cluster.sizes["decode"]}
        self._census: Counter[str] = Counter()
        self._corrupt: dict[str, float] = {}
        self.members: tuple[Member, ...] = ()

    async def begin(self) -> None:
        """Takes what is there now for the whole platform."""
        await self.missing()
        self._census = self._cluster.census()

    async def missing(self, gone: Sequence[int] = ()) -> str:
        """What is not as at the start, in words; "" where nothing is. `gone` are processes that must have ended. Takes up to 2 s."""
        if not self._cluster.is_up:
            return "tandem up has ended"
        if not are_gone(gone):
            return "the process that was killed"
        if lacking := self._census - self._cluster.census():
            return f"processes: {', '.join(sorted(lacking))}"
        try:
            self.members = (await self._register.snapshot()).members
            for address in self._cluster.routers:
                async with AsyncClient(address) as client:
                    status = await client.status(timeout_s=_ASK_S)
                ready = {
                    (item.lease.replica_id, item.lease.incarnation): item.lease.role
                    for item in status.replicas
                    if item.is_reachable and item.lease.state is ReplicaState.READY
                }
                if lost := {role for role, count in self._wanted.items() if list(ready.values()).count(role) < count}:
                    return f"{', '.join(sorted(lost))} replicas at {status.router_id}"
                if any(key not in ready for key in self._registered()):
                    return f"a registered replica at {status.router_id}"
        except TandemError as error:
            return f"an answer ({error.reason})"
        kinds = Counter(member.kind for member in self.members)
        if kinds[MemberKind.ROUTER] < len(self._cluster.routers) or not kinds[MemberKind.AUTOSCALER] or not kinds[MemberKind.STORE]:
            return "a lease of a router, the autoscaler or the store"
        return ""

    def _registered(self) -> list[tuple[str, int]]:
        return [(member.member_id, member.incarnation) for member in self.members if member.kind is MemberKind.REPLICA]

    async def whole_again(self, gone: Sequence[int], limit_s: float) -> str:
        """Waits until nothing is missing and every router answers a probe; "" or what is still missing after that time."""
        missing = "anything"
        try:
            async with asyncio.timeout(limit_s):
                while missing:
                    missing = await self.missing(gone) or await self.probe()
                    await asyncio.sleep(_POLL_S if missing else 0.0)
        except TimeoutError:
            return missing
        return ""

    async def probe(self) -> str:
        """One short request to each router, straight; "" or which one does not answer."""
        for address in self._cluster.routers:
            try:
                async with AsyncClient(address) as client:
                    await client.generate(_PROBE_PROMPT, max_tokens=4, temperature=0.0, timeout_s=_PROBE_S)
            except TandemError as error:
                return f"an answer to a probe ({error.reason})"
        return ""

    async def gauges(self) -> dict[str, float]:
        """What each process says that it holds, by "process gauge"; a process that does not answer is left out."""
        found: dict[str, float] = {}
        for member in self.members:
            address = member.metrics_address or member.http_address
            page = await self._page(address) if address else ""
            for name, value in _SAMPLE.findall(page):
                if name in _GAUGES:
                    found[f"{member.member_id} {name}"] = found.get(f"{member.member_id} {name}", 0.0) + float(value)
        return found

    async def corrupt_blocks(self) -> int:
        """How many damaged blocks the platform has found and dropped since the last call; what dead processes had found is lost."""
        seen: dict[str, float] = {}
        for member in self.members:
            page = await self._page(member.metrics_address) if member.metrics_address else ""
            key = f"{member.member_id} {member.incarnation}"
            for name, value in _SAMPLE.findall(page):
                if name in ("tandem_kv_corrupt_blocks_total", "tandem_store_corrupt_blocks_total"):
                    seen[key] = float(value)
        new = round(sum(value - self._corrupt.get(key, 0.0) for key, value in seen.items()))
        self._corrupt = seen
        return new

    async def _page(self, address: str) -> str:
        try:
            async with self._http.get(f"http://{address}/metrics") as response:
                return await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return ""

    def extra_processes(self) -> list[str]:
        """Processes beyond those of the start, by kind."""
        return [f"{count} more of {kind}" for kind, count in sorted((self._cluster.census() - self._census).items())]

    async def close(self) -> None:
        """Closes connections."""
        await self._register.close()
        await self._http.close()
