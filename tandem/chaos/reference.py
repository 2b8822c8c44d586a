"""What the cases answer where nothing is broken: one plain vLLM engine on the platform's node, without connector, router or seam.

Must not go through any part that the run will break; it has ended before the first fault.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from tokenizers import Tokenizer

from tandem.chaos.cases import Case
from tandem.chaos.cluster import ChaosCluster
from tandem.chaos.verdict import Expected
from tandem.client import AsyncClient
from tandem.config import MIB, EngineConfig, ReplicaConfig
from tandem.demo import DirectCaller
from tandem.domain import Role, Sampling
from tandem.engine.model_files import bundled_model_path
from tandem.errors import ConfigError
from tandem.supervisor import ReplicaSupervisor
from tandem.zygote_client import ZygoteClient

_AT_ONCE = 8
_TOLD_EVERY = 20
_SERVED_MODEL = "bundled"  # what the direct caller asks for, whatever the weights are


def read_prompts(cases: Sequence[Case]) -> list[list[int]]:
    """The token ids of every case's prompt, from the bundled model's field."""
    tokenizer = Tokenizer.from_file(str(bundled_model_path() / "tokenizer.json"))
    ids: list[int] = tokenizer.encode((bundled_model_path() / "sample.txt").read_text()).ids
    rows = []
    for case in cases:
        start = int(case.offset * len(ids))
        turned = ids[start:] + ids[:start]
        rows.append((turned * (1 + case.prompt_tokens // len(turned)))[: case.prompt_tokens])
    return rows


async def reference_answers(
    cluster: ChaosCluster, cases: Sequence[Case], prompts: Sequence[Sequence[int]], progress: Callable[[str], None]
) -> list[Expected]:
    """Every case's answer, several at a time. Raises ConfigError where the engine does not start."""
    answers: dict[int, Expected] = {}
    places = asyncio.Semaphore(_AT_ONCE)
    async with _plain_engine(cluster) as caller, asyncio.TaskGroup() as group:

        async def ask(case: Case) -> None:
            sampling = Sampling(temperature=0.0, max_tokens=case.max_tokens, stop=case.stop, logprobs=case.logprobs)
            async with places:
                completion = await caller.complete(prompts[case.number], sampling)
            answers[case.number] = Expected(
                token_ids=completion.token_ids, text=completion.text, finish_reason=completion.finish_reason.value
            )
            if len(answers) % _TOLD_EVERY == 0 or len(answers) == len(cases):
                progress(f"reference: {len(answers)} of {len(cases)} cases by one plain engine")

        for case in cases:
            group.create_task(ask(case), name=f"reference {case.number}")
    return [answers[case.number] for case in cases]


@asynccontextmanager
async def _plain_engine(cluster: ChaosCluster) -> AsyncIterator[DirectCaller]:
    """A replica without KV transfer, forked by the node's zygote, that no router knows."""
    folder, facts = cluster.node()
    async with AsyncClient(cluster.routers[0]) as client:
        lease = next((item.lease for item in (await client.status()).replicas), None)
    if lease is None:
        raise ConfigError("the platform has no replica to copy the model from")
    config = ReplicaConfig(
        replica_id="reference",
        role=Role.DECODE,
        incarnation=time.time_ns(),
        served_model=_SERVED_MODEL,
        engine=EngineConfig(
            model=lease.model_path,
            dtype=lease.engine.dtype,
            kv_cache_bytes=64 * MIB,
            seed=secrets.randbelow(2**31),
            is_kv_transfer_on=False,
        ),
        node=facts.node,
        runtime_dir=str(folder.path),
        log_path=str(folder.log("reference")),
    )
    supervisor = ReplicaSupervisor(config, ZygoteClient(folder.zygote_socket).start_replica)
    supervisor.begin()
    try:
        caller = DirectCaller(await supervisor.wait_running())
        try:
            yield caller
        finally:
            await caller.close()
    finally:
        await supervisor.stop()
