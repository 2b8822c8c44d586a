"""`make demo`: a cluster by `tandem up`, real prompts through SDK and HTTP, every token checked against plain vLLM, a clean stop.

Prints tokens, receipts and KV traffic; writes one JSON object. Exit status 1 where a check fails.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import tandem
from tandem.cleanup import ClusterProcess, processes_of
from tandem.config import EngineConfig, ReplicaConfig
from tandem.demo.calls import MAX_TOKENS, DirectCaller, Prompts, Run, interleave, run_through_sdk
from tandem.demo.checks import (
    check_http,
    check_sdk,
    exactness,
    make_console,
    missing_metrics,
    print_runs,
    reference_tokens,
    show_text,
    timings,
    verdict,
)
from tandem.domain import Lease, ModelId, ReplicaState, ReplicaTarget, Role
from tandem.endpoint import read_endpoint_file
from tandem.node_folder import NodeFolder, cluster_folder, shm_folder
from tandem.supervisor import ReplicaSupervisor
from tandem.zygote_client import ZygoteClient

LENGTHS = (5, 9, 17, 31, 32, 33, 63, 64, 65, 96, 97, 128, 200, 255, 256, 257, 384, 500, 640, 800, 1000, 1024, 1025, 1250, 1500)
_MODEL = "bundled"
_TIMED_REPEATS = 15
_TIMED_TOKENS = 1000
_HELD_BACK_S = 0.5
_HELD_BACK_REPEATS = 7
_START_S = 120.0
_STOP_S = 60.0
_SCALE_S = 60.0
_SCALING_PROMPTS = 12
_POLL_S = 0.05  # each look costs the two cores some milliseconds

Progress = Callable[[str], None]


class Cluster:
    """A cluster started by the command line, as a user does it, and stopped by Ctrl-C's signal."""

    def __init__(self, progress: Progress) -> None:
        self.id = f"demo-{secrets.token_hex(3)}"
        self._progress = progress
        self._up: asyncio.subprocess.Process | None = None
        self.endpoints: dict[str, object] = {}

    async def start(self) -> None:
        """`tandem up` with one prefill and two decode replicas; returns when it is ready. Raises RuntimeError with its last words."""
        options = ["--port=0", "--http-port=0", "--prefill=1", "--decode=2", "--max-decode=3", "--one-worker-max-tokens=0"]
        self._up = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tandem", "up", f"--cluster={self.id}", *options),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert self._up.stdout is not None
        line = ""
        async with asyncio.timeout(_START_S):
            while text := (await self._up.stdout.readline()).decode():
                line = text.strip()
                self._progress(f"tandem up: {line}")
                if line.startswith("ready in"):
                    self.endpoints = read_endpoint_file(self.id) or {}
                    return
        raise RuntimeError(f"tandem up ended: {line}")

    @property
    def grpc(self) -> str:
        """The routers."""
        return str(self.endpoints["grpc"])

    @property
    def http(self) -> str:
        """The first router's HTTP endpoint."""
        urls = self.endpoints["http"]
        assert isinstance(urls, list)
        return str(urls[0])

    def node(self) -> NodeFolder:
        """The folder of its only node."""
        return NodeFolder(self.id, next(path.parent.name for path in cluster_folder(self.id).glob("*/node.json")))

    def memory_mb(self) -> dict[str, float]:
        """Proportional set size by kind of process, in MB, and in all."""
        sizes: Counter[str] = Counter()
        for process in self.processes():
            sizes[process.kind] += _pss_bytes(process.pid)
        if self._up is not None:
            sizes["up"] += _pss_bytes(self._up.pid)
        return {**{kind: size / 1e6 for kind, size in sorted(sizes.items())}, "total": sum(sizes.values()) / 1e6}

    def processes(self) -> list[ClusterProcess]:
        """All of its processes but `tandem up` itself."""
        return processes_of(self.id)

    async def stop(self) -> tuple[int, int]:
        """Ctrl-C; how many processes and files in shared memory are left."""
        if self._up is not None and self._up.returncode is None:
            self._up.send_signal(signal.SIGINT)
            async with asyncio.timeout(_STOP_S):
                await self._up.communicate()
        shm = shm_folder(self.id)
        return len(self.processes()), sum(1 for _ in shm.rglob("*")) + shm.exists()


def _pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


@contextlib.asynccontextmanager
async def beside(node: NodeFolder, role: Role, name: str, **engine_changes: object) -> AsyncIterator[ReplicaSupervisor]:
    """One replica more on the node, forked from its zygote, that no router knows; for comparison."""
    facts = node.try_read_facts()
    assert facts is not None
    engine = replace(EngineConfig(store_dir=facts.store_dir, seed=secrets.randbelow(2**31)), **engine_changes)  # type: ignore[arg-type]
    config = ReplicaConfig(
        replica_id=name,
        role=role,
        incarnation=1,
        served_model=_MODEL,
        engine=engine,
        node=facts.node,
        runtime_dir=str(node.path),
        log_path=str(node.log(name)),
    )
    supervisor = ReplicaSupervisor(config, ZygoteClient(node.zygote_socket).start_replica)
    supervisor.begin()
    try:
        await supervisor.wait_running()
        yield supervisor
    finally:
        await supervisor.stop()


async def run_demo() -> dict[str, object]:
    """Runs the demonstration; returns the report."""
    console = make_console()
    prompts = Prompts()
    begun_s = time.monotonic()

    def progress(line: str) -> None:
        console.print(f"{time.monotonic() - begun_s:6.1f} s  {line}", style="dim", markup=False)

    cluster = Cluster(progress)
    report: dict[str, object] = {"schema": "tandem.demo/2"}
    try:
        await cluster.start()
        async with tandem.AsyncClient(cluster.grpc) as client:
            await run_through_sdk(client, prompts.next(40), 1)
            report["ready_s"] = time.monotonic() - begun_s
            progress(f"first token {report['ready_s']:.1f} s after the start")
            await show_text(client, console)
            report["platform_pss_mb"] = cluster.memory_mb()
            cases = [prompts.next(length) for length in LENGTHS]
            ours, plains = await compare(cluster, client, prompts, cases, report, progress)
            print_runs(console, prompts, cases, ours)
            report["sdk_ok"] = await check_sdk(cluster.grpc)
            report["http_ok"] = await check_http(cluster.http, _MODEL)
            progress("one more decode replica, and one fewer, under load")
            scaling_cases = [prompts.next(300) for _ in range(_SCALING_PROMPTS)]
            scaling = await scale(client, scaling_cases, report)
            report["dashboard_metrics_missing"] = await missing_metrics(cluster.http)
            progress(f"a prefill replica whose transfers are held back {_HELD_BACK_S} s")
            report |= await hold_back(cluster, client, prompts)
    finally:
        progress("stopping")
        report["processes_left"], report["shm_files_left"] = await cluster.stop()
    progress("one plain vLLM engine computes the same prompts")
    references = await reference_tokens([*cases, *scaling_cases])
    report |= exactness(cases, ours, plains, references[: len(cases)])
    exact = [run.token_ids == list(reference) for run, reference in zip(scaling, references[len(cases) :], strict=True)]
    report |= {"scaling_prompts": len(exact), "scaling_token_exact": sum(exact)}
    return report


async def compare(
    cluster: Cluster,
    client: tandem.AsyncClient,
    prompts: Prompts,
    cases: Sequence[Sequence[int]],
    report: dict[str, object],
    progress: Progress,
) -> tuple[list[Run], list[Run]]:
    """Every case through the platform and on a plain replica, interleaved; then the timed prompts. Adds the timings to the report."""
    progress(f"{len(cases)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens, the same on a plain replica, interleaved")
    async with beside(cluster.node(), Role.DECODE, "plain", is_kv_transfer_on=False) as replica:
        plain = DirectCaller(await replica.wait_running())
        await plain.run(prompts.next(40), 4)
        ours, plains = await interleave(client, plain, cases, MAX_TOKENS)
        progress(f"{_TIMED_REPEATS} prompts of {_TIMED_TOKENS} tokens for the timings")
        timed = [prompts.next(_TIMED_TOKENS) for _ in range(_TIMED_REPEATS)]
        timed_ours, timed_plains = await interleave(client, plain, timed, MAX_TOKENS)
        report |= timings(ours + timed_ours, plains + timed_plains, timed_ours)
        tails = [await plain.run(prompts.next(_TIMED_TOKENS % EngineConfig().block_size_tokens + 1), 1) for _ in timed]
        report["plain_tail_ttft_p50_s"] = statistics.median(run.times_s[0] for run in tails)
        await plain.close()
    return ours, plains


async def scale(client: tandem.AsyncClient, cases: Sequence[Sequence[int]], report: dict[str, object]) -> list[Run]:
    """Has a third decode replica come and go while requests run; their answers. Adds `scaled_up_s`, decision to its first token."""
    before = await decode_leases(client)
    started_s = time.monotonic()
    running = asyncio.create_task(one_after_the_other(client, cases), name="load")
    await client.scale([decode_target(len(before) + 1)])
    known = {lease.replica_id for lease in before}
    leases = await wait_for_decode(client, lambda leases: len(leases) > len(known))
    newcomer = DirectCaller(next(lease for lease in leases if lease.replica_id not in known))
    first = await newcomer.run(cases[0], 1)
    report["scaled_up_s"] = time.monotonic() - started_s
    await newcomer.close()
    await client.scale([decode_target(len(before))])
    await wait_for_decode(client, lambda leases: len(leases) == len(known))
    runs = await running
    report["scaled_down_ok"] = len(first.token_ids) == 1 and len(await decode_leases(client)) == len(before)
    await client.scale([decode_target(-1)])
    return runs


async def one_after_the_other(client: tandem.AsyncClient, cases: Sequence[Sequence[int]]) -> list[Run]:
    """The load during scaling."""
    return [await run_through_sdk(client, token_ids, MAX_TOKENS) for token_ids in cases]


async def wait_for_decode(client: tandem.AsyncClient, is_so: Callable[[list[Lease]], bool]) -> list[Lease]:
    """The decode replicas, once it is so."""
    async with asyncio.timeout(_SCALE_S):
        while not is_so(leases := await decode_leases(client)):  # noqa: ASYNC110 - the cluster tells nobody
            await asyncio.sleep(_POLL_S)
    return leases


async def ready_leases(client: tandem.AsyncClient) -> list[Lease]:
    """Replicas that serve now."""
    status = await client.status()
    return [replica.lease for replica in status.replicas if replica.is_reachable and replica.lease.state is ReplicaState.READY]


async def decode_leases(client: tandem.AsyncClient) -> list[Lease]:
    """Those of them that decode."""
    return [lease for lease in await ready_leases(client) if lease.role is Role.DECODE]


def decode_target(replicas: int) -> ReplicaTarget:
    """For the bundled model; -1 gives the pool back."""
    return ReplicaTarget(model=ModelId(_MODEL), role=Role.DECODE, replicas=replicas)


async def hold_back(cluster: Cluster, client: tandem.AsyncClient, prompts: Prompts) -> dict[str, object]:
    """Whether the first token leaves before any KV has moved: TTFT of a pair whose transfers wait, against the ordinary pair."""
    leases = {lease.role: lease for lease in await ready_leases(client)}
    decode, prefill = leases[Role.DECODE], leases[Role.PREFILL]
    async with beside(cluster.node(), Role.PREFILL, "held-prefill", faults=f"kv_publish.delay_s={_HELD_BACK_S}") as replica:
        usual, held = DirectCaller(decode, [prefill]), DirectCaller(decode, [await replica.wait_running()])
        await held.run(prompts.next(320), 4)
        usual_runs, held_runs = [], []
        for _ in range(_HELD_BACK_REPEATS):
            usual_runs.append(await usual.run(prompts.next(320), 4))
            held_runs.append(await held.run(prompts.next(320), 4))
        await usual.close()
        await held.close()
    usual_s = statistics.median(run.times_s[0] for run in usual_runs)
    held_s = statistics.median(run.times_s[0] for run in held_runs)
    second_s = min(run.times_s[1] for run in held_runs)  # with KV: none may come before the transfers, which begin after the call
    return {
        "first_token_before_kv": held_s < usual_s + _HELD_BACK_S / 2 and second_s >= _HELD_BACK_S,
        "held_back_ttft_p50_s": held_s,
        "not_held_back_ttft_p50_s": usual_s,
        "held_back_second_token_min_s": second_s,
    }


def main() -> int:
    """Runs, writes the report, judges it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tandem.demo")
    parser.add_argument("--json", type=Path, default=Path("build/demo.json"))
    path = parser.parse_args().json
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    report = asyncio.run(run_demo())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    status = verdict(report)
    print(f"report: {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
