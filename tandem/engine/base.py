"""What a replica needs of an engine: tokens from tokens, text from tokens, load, and an end.

Engines run a request from its token ids; they know nothing of plans, roles or gRPC.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from tandem.domain import EngineInfo, FinishReason, Logprobs, Sampling
from tandem.held_blocks import HeldBlocks
from tandem.step_sample import StepSample

MAX_STEP_SAMPLES = 64  # an engine keeps for `take_steps`, which is called ten times a second


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One run: `token_ids` are all tokens so far, prompt and output alike; `sampling` is what is left to do.

    The last `resumed_tokens` of them are output of another worker or an earlier run.
    """

    run_id: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    resumed_tokens: int = 0
    cache_salt: str = ""
    priority: int = 0
    load_kv: bool = True
    publish_kv: bool = True
    counts_use: bool = True  # of its prefix's blocks; false for the second half of a hand-off


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutput:
    """New tokens of one choice. `stop_reason` is a stop token's id in decimal; `cached_tokens` counts tokens not computed here."""

    choice_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What the engine is busy with."""

    running_requests: int
    waiting_requests: int
    kv_used_fraction: float
    unowned_requests: int = 0  # that nobody reads, and whose end is not yet known here


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLoaded:
    """What one run took from caches: tokens from the engine's own, blocks and bytes from the store."""

    local_tokens: int
    blocks: int
    payload_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTotals:
    """Cumulative KV transfer counts of one engine."""

    published_blocks: int = 0
    published_bytes: int = 0
    loaded_blocks: int = 0
    loaded_bytes: int = 0
    corrupt_blocks: int = 0
    missing_blocks: int = 0
    unstored_blocks: int = 0
    evicted_blocks: int = 0


class OutputText(Protocol):
    """Text of one choice as its tokens come, stop strings included."""

    def add(self, token_ids: tuple[int, ...], *, is_stop_token: bool) -> str | None:
        """Takes new tokens; returns the stop string they complete, else None. `is_stop_token`: the last one ended the run."""

    def kept_tokens(self) -> int:
        """Output tokens up to the one that completed the stop string, resumed ones included."""

    def take(self, *, is_finished: bool) -> str:
        """Text that was not taken yet; what could still become a stop string is held back until the end."""


class KvLink(Protocol):
    """An engine's link to the KV store: how its connector is named and configured, and what the connector reports back."""

    def connector(self) -> tuple[str, str, dict[str, object]]:
        """Class name, module and settings of the connector, for the engine's own process."""

    def run_params(self, run_id: str, *, load: bool, publish: bool, counts_use: bool = True) -> dict[str, str | bool]:
        """What a run carries for the connector; starts expecting its reports."""

    def listen(self) -> None:
        """Takes reports on the running loop."""

    async def published(self, run_id: str, timeout_s: float) -> int:
        """As `Engine.published`."""

    def take_loaded(self, run_id: str) -> KvLoaded | None:
        """As `Engine.take_loaded`."""

    def forget(self, run_id: str) -> None:
        """The run has ended."""

    def totals(self) -> KvTotals:
        """Transfer counts now."""

    def close(self) -> None:
        """Stops listening; idempotent."""


class Engine(Protocol):
    """One engine. All methods belong to one event loop."""

    info: EngineInfo
    blocks: HeldBlocks  # of the engine's own prefix cache

    def start(self) -> None:
        """Attaches to the running event loop."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Runs a request; closing the iterator aborts it. Raises EngineError, InvalidRequestError."""

    def output_text(self, token_ids: tuple[int, ...], sampling: Sampling) -> OutputText:
        """Text state primed with the prompt's tokens."""

    async def published(self, run_id: str, timeout_s: float) -> int:
        """Waits until the run's prompt blocks are in the store; how many leading ones are. 0 after `timeout_s`."""

    def take_loaded(self, run_id: str) -> KvLoaded | None:
        """What the run loaded, once; None where nothing was."""

    def forget(self, run_id: str) -> None:
        """The run has ended: drops what is kept of it for `published` and `take_loaded`."""

    def load(self) -> EngineLoad:
        """Load now."""

    def take_steps(self) -> tuple[StepSample, ...]:
        """Steps measured since the last call, in their order: MAX_STEP_SAMPLES at most, prefill and decode steps among them."""

    def kv_totals(self) -> KvTotals:
        """Transfer counts now."""

    async def check_health(self) -> None:
        """Raises EngineError where the engine is dead."""

    def close(self) -> None:
        """Ends the engine and its processes; idempotent."""
