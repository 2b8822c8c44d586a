"""The words of the domain: requests, sampling, leases, plans, receipts. Plain values, all immutable.

Must not do I/O or know the wire: `convert.py` translates to and from protobuf.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from tandem.errors import InvalidRequestError, Reason

RequestId = NewType("RequestId", str)
ReplicaId = NewType("ReplicaId", str)
ModelId = NewType("ModelId", str)
Namespace = NewType("Namespace", str)
BlockHash = NewType("BlockHash", bytes)

HOST_PORT = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\]):(?P<port>[0-9]{1,5})")
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_LOGPROBS = 20
MAX_CHOICES = 16
GREEDY_TEMPERATURE = 1e-5  # below it the engine always takes the most likely token, and refuses several choices
MAX_REQUEST_ID_CHARS = 128
MAX_PREFILL_CANDIDATES = 16  # of one plan
DEFAULT_TENANT = "default"  # everybody, where no tenants are configured


class Role(StrEnum):
    """What the router sends a replica; every replica can do both."""

    PREFILL = "prefill"
    DECODE = "decode"


class ReplicaState(StrEnum):
    """Where a replica is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class FinishReason(StrEnum):
    """Why a stream ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestState(StrEnum):
    """Where a request of a router stands."""

    WAITING = "waiting"  # for a worker, for the first time or again
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"  # after it had been given to workers
    REFUSED = "refused"  # before
    CANCELLED = "cancelled"  # by its caller


class StructuredKind(StrEnum):
    """How structured output is described."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"
    JSON_OBJECT = "json_object"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """A constraint on the output; `value` holds one string, or the choices, and nothing for JSON_OBJECT."""

    kind: StructuredKind
    value: tuple[str, ...] = ()

    def validate(self) -> None:
        """Raises InvalidRequestError where the constraint says nothing."""
        if self.kind is not StructuredKind.JSON_OBJECT and not (self.value and all(self.value)):
            raise InvalidRequestError("sampling.structured_output", f"{self.kind} must not be empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How output tokens are drawn and where they end. Absent limits are None."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_output: StructuredOutput | None = None

    def validate(self) -> None:
        """Raises InvalidRequestError naming the field and its limit."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequestError("sampling.max_tokens", f"must be at least 1, got {self.max_tokens}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequestError(f"sampling.{name}", f"must be a finite number from {low:g} to {high:g}, got {value}")
        if self.top_p <= 0.0:
            raise InvalidRequestError("sampling.top_p", "must be greater than 0")
        if self.repetition_penalty <= 0.0:
            raise InvalidRequestError("sampling.repetition_penalty", "must be greater than 0")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise InvalidRequestError("sampling.min_tokens", f"must be from 0 to max_tokens, got {self.min_tokens}")
        if not 0 <= self.top_k < 2**31:
            raise InvalidRequestError("sampling.top_k", f"must be from 0 to {2**31 - 1}, got {self.top_k}")
        if not 1 <= self.n <= MAX_CHOICES:
            raise InvalidRequestError("sampling.n", f"must be from 1 to {MAX_CHOICES}, got {self.n}")
        if self.n > 1 and self.temperature < GREEDY_TEMPERATURE:
            raise InvalidRequestError("sampling.n", "must be 1 with temperature 0: all choices would be the same")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidRequestError("sampling.logprobs", f"must be from 0 to {MAX_LOGPROBS}, got {self.logprobs}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError("sampling.stop", f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}")
        if any(not 1 <= len(text) <= MAX_STOP_STRING_CHARS for text in self.stop):
            raise InvalidRequestError("sampling.stop", f"each stop string must have 1 to {MAX_STOP_STRING_CHARS} characters")
        if any(not math.isfinite(bias) for bias in self.logit_bias.values()):
            raise InvalidRequestError("sampling.logit_bias", "every bias must be a finite number")
        if self.structured_output is not None:
            self.structured_output.validate()

    def one_worker_reason(self) -> str | None:
        """Why this request cannot be handed off exactly, or None where it can (the table in decode_workers/README.md)."""
        return "n" if self.n > 1 else None  # several choices are no one chain of positions


_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, 100.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Objectives in seconds; None is none."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def validate(self) -> None:
        """Raises InvalidRequestError where an objective is not a time."""
        for name, value in (("slo.ttft_s", self.ttft_s), ("slo.tpot_s", self.tpot_s)):
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise InvalidRequestError(name, f"must be a finite number of seconds above 0, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request after tokenisation: what every later stage works on."""

    request_id: RequestId
    model: ModelId
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    resume_token_ids: tuple[int, ...] = ()
    priority: int = 0
    sheddable: bool = False
    slo: Slo = field(default_factory=Slo)
    session_id: str = ""
    expected_output_tokens: int | None = None
    cache_salt: str = ""
    tenant: str = DEFAULT_TENANT  # by the caller's key alone, never by what the request says

    @property
    def total_tokens(self) -> int:
        """Prompt plus resumed tokens: what some worker must hold as KV before the next token."""
        return len(self.prompt_token_ids) + len(self.resume_token_ids)

    def validate(self, engine: "EngineInfo") -> None:
        """Raises InvalidRequestError naming the field and the engine's limit."""
        self.sampling.validate()
        self.slo.validate()
        if not self.prompt_token_ids:
            raise InvalidRequestError("prompt", "must not be empty")
        for name, ids in (("prompt.token_ids", self.prompt_token_ids), ("resume_token_ids", self.resume_token_ids)):
            check_token_ids(name, ids, engine.vocabulary_tokens)
        check_token_ids("sampling.stop_token_ids", self.sampling.stop_token_ids, engine.vocabulary_tokens)
        check_token_ids("sampling.logit_bias", tuple(self.sampling.logit_bias), engine.vocabulary_tokens)
        check_prompt_tokens(len(self.prompt_token_ids), engine.context_tokens)
        limit = self.max_output_tokens(engine)
        if self.sampling.max_tokens is not None and self.sampling.max_tokens > engine.context_tokens:
            raise InvalidRequestError(
                "sampling.max_tokens", f"must be at most the context of {engine.context_tokens} tokens, got {self.sampling.max_tokens}"
            )
        if len(self.resume_token_ids) >= limit:
            raise InvalidRequestError(
                "resume_token_ids", f"{len(self.resume_token_ids)} resumed tokens leave none of the {limit} output tokens allowed"
            )

    def max_output_tokens(self, engine: "EngineInfo") -> int:
        """Output tokens this request may have in all, resumed ones included."""
        room = engine.context_tokens - len(self.prompt_token_ids)
        return room if self.sampling.max_tokens is None else min(self.sampling.max_tokens, room)


def check_prompt_tokens(tokens: int, context_tokens: int) -> None:
    """Raises InvalidRequestError where a prompt of so many tokens leaves no room for output."""
    if tokens >= context_tokens:
        raise InvalidRequestError(
            "prompt", f"{tokens} tokens leave no room for output in the context of {context_tokens} tokens", reason=Reason.PROMPT_TOO_LONG
        )


def check_token_ids(field_name: str, token_ids: Sequence[int], vocabulary_tokens: int) -> None:
    """Raises InvalidRequestError where an id is not in the vocabulary; O(n)."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocabulary_tokens):
        bad = next(token for token in token_ids if not 0 <= token < vocabulary_tokens)
        raise InvalidRequestError(field_name, f"token id {bad} is not in the vocabulary of {vocabulary_tokens}")


def check_slack(field_name: str, slack_s: float) -> None:
    """Raises InvalidRequestError where it is not a time."""
    if not math.isfinite(slack_s):
        raise InvalidRequestError(field_name, f"must be a finite number of seconds, got {slack_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine can take. Sizes in tokens, blocks and bytes as named."""

    block_size_tokens: int
    context_tokens: int
    vocabulary_tokens: int
    kv_blocks: int
    kv_block_bytes: int
    dtype: str
    engine: str
    engine_version: str
    eos_token_ids: tuple[int, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    hardware: str = "cpu"  # what it runs on, a name for step times that are alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who a replica is. `incarnation` grows with each start of the same `replica_id`."""

    replica_id: ReplicaId
    incarnation: int
    node: str
    role: Role
    model: ModelId
    model_path: str
    namespace: Namespace
    address: str
    engine: EngineInfo
    state: ReplicaState = ReplicaState.READY
    metrics_address: str = ""
    store_address: str = ""


class StampKind(StrEnum):
    """What a replica says of one attempt at a request."""

    ACCEPTED = "accepted"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """The totals of this report, and of later ones, include (ACCEPTED) or no longer include (FINISHED) the attempt."""

    request_id: RequestId
    attempt: int
    kind: StampKind


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """Totals of all routers' work on one replica."""

    running_requests: int = 0
    waiting_requests: int = 0
    pending_prefill_tokens: int = 0
    kv_used_fraction: float = 0.0
    kv_tokens: int = 0
    generated_tokens_total: int = 0
    corrupt_blocks_total: int = 0
    missing_blocks_total: int = 0
    loaded_bytes_total: int = 0
    published_bytes_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTarget:
    """How many replicas of a role are wanted; `expires_in_s` is 0 where the target stays."""

    model: ModelId
    role: Role
    replicas: int
    expires_in_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWorker:
    """One worker of a plan."""

    replica_id: ReplicaId
    incarnation: int
    address: str
    node: str = ""
    store_address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedTerm:
    """A predicted quantity and its measured twin; `name` ends in its unit."""

    name: str
    predicted: float
    actual: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where one request runs. `prefill` is best first; empty means that the decode worker does both."""

    plan_id: str
    decode: PlannedWorker
    prefill: tuple[PlannedWorker, ...] = ()
    retry_budget: int = 0
    deadline_remaining_s: float | None = None
    predicted: tuple[PredictedTerm, ...] = ()
    one_worker_reason: str = ""
    router_id: str = ""
    slack_s: float = 0.0  # until the prompt must be begun; below 0: it is late
    prompt_blocks: int = 0
    cached_blocks: int = 0
    prefill_tokens: int = 0  # of the prompt, to be computed by its worker; 0: all

    def validate(self) -> None:
        """Raises InvalidRequestError where no router can have made it."""
        if len(self.prefill) > MAX_PREFILL_CANDIDATES:
            raise InvalidRequestError("plan.prefill", f"at most {MAX_PREFILL_CANDIDATES} workers, got {len(self.prefill)}")
        for worker in self.prefill:
            if not HOST_PORT.fullmatch(worker.address):
                raise InvalidRequestError("plan.prefill", f"address {worker.address[:100]!r} of {worker.replica_id[:100]} is not HOST:PORT")
        check_slack("plan.slack_s", self.slack_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One candidate token; rank 1 is the most likely."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """The sampled token's log probability (nats) and the best candidates'."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request; `cached_tokens` are prompt tokens that nobody had to compute for it."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some output tokens of one choice, from `first_position` on; `text` may lag the tokens."""

    first_position: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    usage: Usage | None = None
    choice_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a request cost, in seconds, tokens and bytes, and where it went.

    ttft = queue + dispatch + prefill. handoff_gap is token 1 to token 2 of a handed-off request.
    """

    request_id: RequestId
    queue_s: float = 0.0
    dispatch_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    handoff_gap_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    decode_recomputed_tokens: int = 0
    kv_bytes_shipped: int = 0
    prefill_replica_id: str = ""
    decode_replica_id: str = ""
    handed_off: bool = False
    one_worker_reason: str = ""
    attempts: int = 1
    predicted: tuple[PredictedTerm, ...] = ()
    router_id: str = ""
    not_exact: tuple[str, ...] = ()
