"""vLLM's connector interface on top of planner, loader and publisher. The only file here that knows the engine.

Scheduler side and worker side share nothing but the step's metadata. Losing a block is a recompute, never an error.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kv_transfer.arena_store import ArenaStore
from kv_transfer.kv_tensors import KvTensors
from kv_transfer.link import ConnectorOptions
from kv_transfer.loader import Loader
from kv_transfer.notices import NoticeSender, TransferTotals
from kv_transfer.planner import KvDirective, ScheduledRequest, StepJobs, TransferPlanner
from kv_transfer.publisher import Publisher
from kv_transfer.quotas import tenant_of
from tandem.domain import Namespace
from tandem.engine.quiet_groups import quiet_process_groups
from tandem.errors import ConfigError
from tandem.faults import Faults
from tandem.heap import trim_heap

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_SPARE_BLOCKS = 64  # for decode
_GRANTED_FRACTION = 16  # of the arena


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to worker."""

    jobs: StepJobs = field(default_factory=StepJobs)


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Worker to scheduler: what must not be loaded again, and what must be saved again."""

    failed_loads: set[str] = field(default_factory=set)
    dropped_saves: set[str] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReport":
        """One report of several workers'."""
        assert isinstance(other, StepReport)
        return StepReport(self.failed_loads | other.failed_loads, self.dropped_saves | other.dropped_saves)


class TandemConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads and publishes the blocks of requests that carry a KvDirective in their kv_transfer_params."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ConfigError("this model mixes kinds of attention (several KV cache groups): start it with --no-kv-transfer")
        if vllm_config.parallel_config.world_size != 1:
            raise ConfigError("KV transfer serves tensor-parallel size 1 only: start it with --no-kv-transfer")
        assert self._kv_transfer_config is not None
        options = ConnectorOptions(**self._kv_transfer_config.kv_connector_extra_config)
        self._options = options
        self._namespace = Namespace(options.namespace)
        self._store = ArenaStore(Path(options.store_dir), capacity_bytes=options.store_capacity_bytes)
        self._requests_by_id: dict[str, Request] = {}
        self._failed_loads: set[str] = set()
        self._dropped_saves: set[str] = set()
        self._invalid_block_ids: set[int] = set()
        self._closers: list[Any] = []
        self._batched_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._block_size_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        if role is KVConnectorRole.SCHEDULER:
            quiet_process_groups()
            trim_heap()
            self._planner = TransferPlanner(
                self._store,
                self._namespace,
                block_size_tokens=self._block_size_tokens,
                block_bytes=sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors) // kv_cache_config.num_blocks,
                sync_load_bytes=options.sync_load_bytes,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped save is a future miss, nothing more."""
        return False

    # Scheduler side.

    def on_new_request(self, request: "Request") -> None:
        """Starts tracking."""
        self._requests_by_id[request.request_id] = request
        tenant = tenant_of(request.cache_salt or "")
        self._planner.track(request.request_id, KvDirective.from_params(request.kv_transfer_params), tenant)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens the store can supply, and whether they load outside the step."""
        return self._planner.match(request.request_id, request.block_hashes, request.num_tokens, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Turns the match into a load."""
        self._planner.allocate(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """This step's loads and saves."""
        return StepMetadata(self._planner.plan_step(self._scheduled(scheduler_output)))

    def _scheduled(self, output: "SchedulerOutput") -> Iterable[ScheduledRequest]:
        state = output.kv_connector_block_state
        assert state is not None
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed.update(zip(output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens, strict=True))
        for request_id, computed_tokens in computed.items():
            request = self._requests_by_id.get(request_id)
            if request is not None:
                yield ScheduledRequest(
                    request_id=request_id,
                    computed_after_tokens=computed_tokens + output.num_scheduled_tokens[request_id],
                    prompt_tokens=request.num_prompt_tokens,
                    hashes=request.block_hashes,
                    block_ids=state.resolve_block_ids(request_id)[0],
                )

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Learns which loads failed, before the next schedule."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, StepReport):
            self._planner.loads_failed(report.failed_loads)
            self._planner.saves_dropped(report.dropped_saves)

    def request_finished_all_groups(self, request: "Request", block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """Forgets the request; its blocks may be freed at once, as slots hold copies."""
        self._planner.finish(request.request_id)
        self._requests_by_id.pop(request.request_id, None)
        return False, None

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The same for engines with one group."""
        return self.request_finished_all_groups(request, (block_ids,))

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Builds loader and publisher over the engine's tensors."""
        tensors = KvTensors(kv_caches)
        tensors.touch()
        notices = NoticeSender(self._options.notice_path)
        totals = TransferTotals()
        batch_blocks = self._batched_tokens // self._block_size_tokens
        capacity_blocks = self._store.stats().capacity_bytes // tensors.block_bytes
        self._loader = Loader(tensors, self._store, self._namespace, notices, totals)
        self._publisher = Publisher(
            tensors,
            self._store,
            self._namespace,
            notices,
            totals,
            # Two steps' worth, and never so much that a few replicas hold most of the arena in their hands.
            granted_blocks=max(1, min(2 * batch_blocks + _SPARE_BLOCKS, capacity_blocks // _GRANTED_FRACTION)),
            faults=Faults.parse(self._options.faults),
        )
        with suppress(OSError):  # a quota that cannot be written is no reason not to serve
            self._store.quotas.set_model(self._namespace, self._options.model_quota_bytes)
        self._closers = [self._publisher, self._loader, notices, self._store]

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Loads what this step needs; hands the rest to the loader's thread."""
        for job in self._jobs().loads:
            if job.is_async:
                self._loader.load_later(job)
                continue
            result = self._loader.load(job)
            if result.invalid_block_ids:
                self._invalid_block_ids.update(result.invalid_block_ids)
                self._failed_loads.add(job.request_id)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads of this step are done before its forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: "AttentionMetadata", **kwargs: Any) -> None:
        """Whole blocks are saved after the forward."""

    def wait_for_save(self) -> None:
        """Stages the blocks that this step filled. After a failed load nothing computed in this step is trusted.

        A prompt that ended in such a step may be its request's last step, so what the store holds of it is told all the same.
        """
        for job in self._jobs().saves:
            if not self._failed_loads:
                self._publisher.submit(
                    job.block_ids,
                    job.hashes,
                    tag=job.tag,
                    prompt_hashes=job.prompt_hashes,
                    first_position=job.first_position,
                    tenant=job.tenant,
                )
                continue
            self._dropped_saves.add(job.request_id)
            if job.prompt_hashes is not None and job.request_id not in self._failed_loads:
                self._publisher.submit([], [], tag=job.tag, prompt_hashes=job.prompt_hashes)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Loads that ended outside the step, each exactly once."""
        finished: set[str] = set()
        for result in self._loader.take_results():
            finished.add(result.request_id)
            if result.invalid_block_ids:
                self._invalid_block_ids.update(result.invalid_block_ids)
                self._failed_loads.add(result.request_id)
        return None, finished or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Engine blocks to compute after all."""
        invalid, self._invalid_block_ids = self._invalid_block_ids, set()
        return invalid

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """This step's report; None where there is nothing to say."""
        if not (self._failed_loads or self._dropped_saves):
            return None
        report = StepReport(self._failed_loads, self._dropped_saves)
        self._failed_loads, self._dropped_saves = set(), set()
        return report

    def reset_cache(self) -> bool | None:
        """The store is shared: an engine that drops its own cache leaves it alone."""
        return True

    def shutdown(self) -> None:
        """Ends the threads."""
        for part in self._closers:
            part.close()
        self._closers = []

    def _jobs(self) -> StepJobs:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.jobs
