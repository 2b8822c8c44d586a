"""One simulated replica: an engine, its block cache, its link, and what it reports to the router. Must not choose or record anything."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from random import Random

from tandem.domain import BlockHash, Lease, RequestId, Stamp, StampKind, WorkerLoad
from tandem.held_blocks import BlockChange
from tandem.sim.block_cache import BlockCache
from tandem.sim.engine_profile import EngineProfile
from tandem.sim.physics import Engine, Job
from tandem.sim.store import Store
from tandem.sim.timeline import Timeline
from tandem.step_sample import StepSample

REPORT_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What moving things takes. One prompt's blocks at a time come in over a replica's link."""

    dispatch_s: float = 1e-3  # router to worker, and the first token back
    latency_s: float = 2e-3  # before the first byte of a transfer
    link_bytes_per_s: float = 25e9  # 200 Gbit/s
    report_delay_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one Watch message says."""

    lease: Lease
    sequence: int
    load: WorkerLoad
    stamps: Sequence[Stamp]
    samples: Sequence[StepSample]
    blocks: BlockChange


class Worker:
    """Accepts attempts, brings blocks from the store, reports totals, stamps, steps and blocks on a 5 Hz grid where something changed."""

    def __init__(
        self,
        lease: Lease,
        profile: EngineProfile,
        network: Network,
        timeline: Timeline,
        rng: Random,
        *,
        cache_blocks: int,
        store: Store | None,
        noise_sigma: float,
        report: Callable[[Report], None],
    ) -> None:
        self.lease = lease
        self.engine = Engine(profile, timeline, rng, noise_sigma=noise_sigma)
        self._profile = profile
        self._network = network
        self._timeline = timeline
        self._cache = BlockCache(cache_blocks)
        self._store = store
        self._report = report
        self._phase_s = rng.random() * REPORT_EVERY_S
        self._link_free_s = 0.0
        self._block_tokens = lease.engine.block_size_tokens
        self._runs: dict[tuple[RequestId, int], tuple[int, int]] = {}  # prefill and KV tokens of accepted attempts
        self._prefill_tokens = 0
        self._kv_tokens = 0
        self._stamps: list[Stamp] = []
        self._samples: list[StepSample] = []
        self._sequence = 0
        self._is_report_planned = False
        self.fetched_tokens = 0
        self.engine.on_step = self._sample

    def cached_tokens(self, block_hashes: Sequence[BlockHash], total_tokens: int) -> int:
        """Leading tokens in the replica's own cache; the last token is always computed."""
        return min(self._cache.match(block_hashes) * self._block_tokens, total_tokens - 1)

    def accept(self, request_id: RequestId, attempt: int, *, prefill_tokens: int, kv_tokens: int) -> None:
        """Counts an attempt from now on."""
        self._runs[request_id, attempt] = (prefill_tokens, kv_tokens)
        self._prefill_tokens += prefill_tokens
        self._kv_tokens += kv_tokens
        self._stamp(request_id, attempt, StampKind.ACCEPTED)

    def prefilled(self, request_id: RequestId, attempt: int) -> None:
        """Its first token has left."""
        prefill_tokens, kv_tokens = self._runs[request_id, attempt]
        self._runs[request_id, attempt] = (0, kv_tokens)
        self._prefill_tokens -= prefill_tokens
        self._plan_report()

    def finish(self, request_id: RequestId, attempt: int) -> None:
        """The attempt is over here; again is no harm."""
        run = self._runs.pop((request_id, attempt), None)
        if run is not None:
            self._prefill_tokens -= run[0]
            self._kv_tokens -= run[1]
            self._stamp(request_id, attempt, StampKind.FINISHED)

    def prefill(self, job: Job, block_hashes: Sequence[BlockHash]) -> None:
        """Computes the prompt, after a fetch of what the store has where that is quicker than to compute it."""
        fetch_tokens = self._worthwhile_tokens(job, block_hashes)
        if not fetch_tokens:
            self.engine.prefill(job)
            return
        self.fetched_tokens += fetch_tokens
        started_s = max(self._link_free_s, self._timeline.now_s)
        self._link_free_s = started_s + self._transfer_s(fetch_tokens)
        self._timeline.at(self._link_free_s + self._network.latency_s, self._fetched, job, block_hashes)

    def computed(self, block_hashes: Sequence[BlockHash]) -> None:
        """The prompt's blocks are here, and published to the store."""
        self._cache.put(block_hashes)
        if self._store is not None:
            self._store.put(block_hashes)

    def received(self, block_hashes: Sequence[BlockHash]) -> None:
        """The prompt's blocks came from another replica."""
        self._cache.put(block_hashes)

    def handoff_s(self, total_tokens: int) -> float:
        """From the first token to the KV being here: only the last chunk's is still to come, the others came while it was computed."""
        return self._network.latency_s + self._transfer_s(min(total_tokens, self._profile.max_num_batched_tokens))

    def handoff_bytes(self, total_tokens: int) -> int:
        """Of all its KV."""
        return total_tokens * self._profile.kv_bytes_per_token

    def _transfer_s(self, tokens: int) -> float:
        return tokens * self._profile.kv_bytes_per_token / self._network.link_bytes_per_s

    def _worthwhile_tokens(self, job: Job, block_hashes: Sequence[BlockHash]) -> int:
        if self._store is None:
            return 0
        here = self.cached_tokens(block_hashes, job.total_tokens)
        stored = min(self._store.match(block_hashes) * self._block_tokens, job.total_tokens - 1)
        if stored <= here:
            return 0
        wait_s = max(0.0, self._link_free_s - self._timeline.now_s) + self._network.latency_s
        fetch_s = wait_s + self._transfer_s(stored - here)
        return stored - here if fetch_s < self._profile.compute_s(stored - here, here) else 0

    def _fetched(self, job: Job, block_hashes: Sequence[BlockHash]) -> None:
        if self._store is not None:
            held = block_hashes[: self._store.match(block_hashes)]
            self._store.put(held)
            self._cache.put(held)
        self.engine.prefill(job)

    def _stamp(self, request_id: RequestId, attempt: int, kind: StampKind) -> None:
        self._stamps.append(Stamp(request_id=request_id, attempt=attempt, kind=kind))
        self._plan_report()

    def _sample(self, sample: StepSample) -> None:
        self._samples.append(sample)
        self._plan_report()

    def _plan_report(self) -> None:
        if not self._is_report_planned:
            self._is_report_planned = True
            passed = floor((self._timeline.now_s - self._phase_s) / REPORT_EVERY_S) + 1
            self._timeline.at(self._phase_s + passed * REPORT_EVERY_S, self._send_report)

    def _send_report(self) -> None:
        self._is_report_planned = False
        self._sequence += 1
        load = WorkerLoad(
            running_requests=len(self._runs),
            pending_prefill_tokens=self._prefill_tokens,
            kv_used_fraction=min(1.0, self.engine.kv_tokens / self._profile.kv_room_tokens),
            kv_tokens=self._kv_tokens,
        )
        stamps, self._stamps = self._stamps, []
        samples, self._samples = self._samples, []
        sent_s = self._timeline.now_s + self._network.report_delay_s
        report = Report(
            lease=self.lease, sequence=self._sequence, load=load, stamps=stamps, samples=samples, blocks=self._cache.take_change()
        )
        self._timeline.at(sent_s, self._report, report)
