"""A replica of each engine on the platform that tests share, for what every engine keeps to."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tandem.domain import Role
from tandem.launch import ReplicaProcess
from tests.integration.conftest import Cluster


@asynccontextmanager
async def engine_replica(cluster: Cluster, engine: str) -> AsyncIterator[ReplicaProcess]:
    """vLLM's is there; another one is started, without a router that knows it."""
    if engine == "vllm":
        yield cluster.platform.replicas["plain"]
        return
    replica = await cluster.platform.add_replica(Role.DECODE, engine, engine=engine)
    try:
        yield replica
    finally:
        await cluster.platform.remove_replica(engine)
