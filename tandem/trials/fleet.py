"""The cluster that a trial loads, with tenants and a profile of its own, and a look at its metrics. Must not send requests."""

import re
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tandem.chaos.cluster import ChaosCluster

# Slow enough that the fleet is the limit and not the two cores under it: 700 tokens take 0.7 s, 16 replicas some 20 requests a second.
PROFILE: Mapping[str, float] = {
    "base_s": 0.02,
    "prefill_token_s": 1e-3,
    "prefill_pair_s": 0.0,
    "decode_request_s": 1e-4,
    "eos_fraction": 0.0,
}
_CHUNK_TOKENS = 512  # half a second a step, as 8,192 tokens take on a GPU
SIMULATED_REPLICAS = 8  # of each role
_ASK_S = 10.0
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class Fleet:
    """One running cluster."""

    def __init__(self, cluster: ChaosCluster, http: aiohttp.ClientSession) -> None:
        self.routers = cluster.routers
        self.cluster = cluster
        self._http = http

    async def total(self, name: str, *labels: str) -> float:
        """The sum of a metric over all processes, of those series that have all these labels (`tenant="a"`)."""
        found = 0.0
        for url in await self._pages():
            async with self._http.get(url) as answer:
                page = await answer.text()
            for sample, its_labels, value in _SAMPLE.findall(page):
                if sample == name and all(label in its_labels for label in labels):
                    found += float(value)
        return found

    async def _pages(self) -> list[str]:
        async with self._http.get(f"{self.cluster.http_urls[0]}/sd") as answer:
            groups = await answer.json()
        return sorted(f"http://{address}/metrics" for group in groups for address in group["targets"])


@asynccontextmanager
async def simulated_fleet(tenants: str = "", profile: Mapping[str, float] = PROFILE) -> AsyncIterator[Fleet]:
    """8 + 8 simulated replicas behind two routers; `tenants` are TOML tables."""
    with tempfile.TemporaryDirectory() as folder:
        config, step_profile = Path(folder) / "cluster.toml", Path(folder) / "profile.toml"
        config.write_text(f"[[models]]\nmax_num_batched_tokens = {_CHUNK_TOKENS}\n{tenants}")
        step_profile.write_text("".join(f"{name} = {value!r}\n" for name, value in profile.items()))
        options = [f"--config={config}", "--engine=simulated", f"--step-profile={step_profile}"]
        async with fleet(SIMULATED_REPLICAS, SIMULATED_REPLICAS, 2, options) as running:
            yield running


@asynccontextmanager
async def fleet(prefill: int, decode: int, routers: int, options: Sequence[str]) -> AsyncIterator[Fleet]:
    """A cluster from its start to its end."""
    cluster = ChaosCluster(prefill=prefill, decode=decode, routers=routers, options=options)
    try:
        await cluster.start(lambda words: print(words, flush=True))
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_S)) as http:
            yield Fleet(cluster, http)
    finally:
        await cluster.stop()
