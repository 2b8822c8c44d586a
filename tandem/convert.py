"""The domain's values to and from their protobuf messages.

Must not do I/O or judge values: `domain.py` validates. `*_to_pb` raise InvalidRequestError naming the field that its type cannot hold
(a negative count, text that is not UTF-8); `*_from_pb` raise ProtocolError where a message lacks a part or holds an unknown enum value.
What the domain has no word for (a plan's signature and block holders) is not carried over.
"""

from collections.abc import Sequence

from tandem.domain import (
    Chunk,
    EngineInfo,
    FinishReason,
    Lease,
    Logprobs,
    Plan,
    PlannedWorker,
    PredictedTerm,
    Receipt,
    ReplicaState,
    Request,
    Role,
    Sampling,
    Slo,
    StructuredKind,
    StructuredOutput,
    TokenLogprob,
    Usage,
    WorkerLoad,
)
from tandem.errors import InvalidRequestError, ProtocolError
from tandem.held_blocks import BlockChange
from tandem.short_hash import SHORT_BYTES
from tandem.step_sample import StepSample
from tandem.v1 import common_pb2, inference_pb2, worker_pb2
from tandem.wire import build, from_message, to_message

# The wire says 0 for "no deadline", so a deadline that has just passed travels as the shortest time there is.
_SHORTEST_DEADLINE_S = 1e-9

_ROLES = {Role.PREFILL: common_pb2.ROLE_PREFILL, Role.DECODE: common_pb2.ROLE_DECODE}
_STATES = {
    ReplicaState.STARTING: common_pb2.REPLICA_STATE_STARTING,
    ReplicaState.READY: common_pb2.REPLICA_STATE_READY,
    ReplicaState.DRAINING: common_pb2.REPLICA_STATE_DRAINING,
}
_FINISH_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_ROLE_OF = {number: role for role, number in _ROLES.items()}
_STATE_OF = {number: state for state, number in _STATES.items()}
_FINISH_REASON_OF = {number: reason for reason, number in _FINISH_REASONS.items()}


def role_to_pb(role: Role) -> common_pb2.Role:
    """The role's number."""
    return _ROLES[role]


def role_from_pb(number: common_pb2.Role) -> Role:
    """The role; raises ProtocolError where it is unset or unknown."""
    if number not in _ROLE_OF:
        raise ProtocolError(f"unknown replica role {number}")
    return _ROLE_OF[number]


def finish_reason_to_pb(reason: FinishReason | None) -> common_pb2.FinishReason:
    """The reason's number; unspecified for None."""
    return _FINISH_REASONS[reason]


def finish_reason_from_pb(number: common_pb2.FinishReason) -> FinishReason | None:
    """The reason, None where it is unset; raises ProtocolError where it is unknown."""
    if number not in _FINISH_REASON_OF:
        raise ProtocolError(f"unknown finish reason {number}")
    return _FINISH_REASON_OF[number]


def sampling_to_pb(sampling: Sampling) -> common_pb2.Sampling:
    """All settings, defaults written out. Raises InvalidRequestError naming the field."""
    structured = {} if sampling.structured_output is None else _structured_to_fields(sampling.structured_output)
    return to_message(common_pb2.Sampling, "sampling", sampling, logit_bias=sampling.logit_bias, **structured)


def _structured_to_fields(structured: StructuredOutput) -> dict[str, object]:
    field = "sampling.structured_output"
    match structured.kind:
        case StructuredKind.JSON_OBJECT:
            return {"json_object": True}
        case StructuredKind.CHOICE:
            return {"choices": build(common_pb2.Choices, field, choices=structured.value)}
        case StructuredKind.JSON_SCHEMA | StructuredKind.REGEX | StructuredKind.GRAMMAR:
            if len(structured.value) != 1:
                raise InvalidRequestError(field, f"{structured.kind} takes exactly one string, got {len(structured.value)}")
            return {structured.kind.value: structured.value[0]}


def sampling_from_pb(message: common_pb2.Sampling) -> Sampling:
    """The settings; absent ones keep the defaults of `Sampling`. Not validated."""
    return from_message(Sampling, message, logit_bias=dict(message.logit_bias), structured_output=_structured_from_pb(message))


def _structured_from_pb(message: common_pb2.Sampling) -> StructuredOutput | None:
    match message.WhichOneof("structured_output"):
        case "json_schema":
            return StructuredOutput(kind=StructuredKind.JSON_SCHEMA, value=(message.json_schema,))
        case "regex":
            return StructuredOutput(kind=StructuredKind.REGEX, value=(message.regex,))
        case "grammar":
            return StructuredOutput(kind=StructuredKind.GRAMMAR, value=(message.grammar,))
        case "choices":
            return StructuredOutput(kind=StructuredKind.CHOICE, value=tuple(message.choices.choices))
        case "json_object" if message.json_object:
            return StructuredOutput(kind=StructuredKind.JSON_OBJECT, value=())
        case _:
            return None


def slo_to_pb(slo: Slo) -> common_pb2.Slo:
    """Objectives in seconds; raises InvalidRequestError naming the field."""
    return to_message(common_pb2.Slo, "slo", slo)


def slo_from_pb(message: common_pb2.Slo) -> Slo:
    """Objectives in seconds; absent is None."""
    return from_message(Slo, message)


def engine_info_to_pb(info: EngineInfo) -> common_pb2.EngineInfo:
    """Raises InvalidRequestError naming the field."""
    return to_message(common_pb2.EngineInfo, "engine", info)


def engine_info_from_pb(message: common_pb2.EngineInfo) -> EngineInfo:
    """The engine's limits."""
    return from_message(EngineInfo, message)


def lease_to_pb(lease: Lease) -> common_pb2.Lease:
    """Raises InvalidRequestError naming the field."""
    engine = engine_info_to_pb(lease.engine)
    return to_message(common_pb2.Lease, "lease", lease, role=_ROLES[lease.role], state=_STATES[lease.state], engine=engine)


def lease_from_pb(message: common_pb2.Lease) -> Lease:
    """Raises ProtocolError where role, state or engine are missing or unknown."""
    if message.state not in _STATE_OF or not message.HasField("engine"):
        raise ProtocolError(f"lease of replica {message.replica_id!r} has no known state or no engine")
    role, state = role_from_pb(message.role), _STATE_OF[message.state]
    return from_message(Lease, message, role=role, state=state, engine=engine_info_from_pb(message.engine))


def load_to_pb(load: WorkerLoad) -> worker_pb2.WorkerLoad:
    """Raises InvalidRequestError naming the field."""
    return to_message(worker_pb2.WorkerLoad, "load", load)


def load_from_pb(message: worker_pb2.WorkerLoad) -> WorkerLoad:
    """A replica's totals."""
    return from_message(WorkerLoad, message)


def step_to_pb(step: StepSample) -> worker_pb2.StepSample:
    """Raises InvalidRequestError naming the field."""
    return to_message(worker_pb2.StepSample, "step", step)


def step_from_pb(message: worker_pb2.StepSample) -> StepSample:
    """A step as a replica measured it."""
    return from_message(StepSample, message)


def block_change_to_pb(change: BlockChange) -> list[worker_pb2.BlockEvent]:
    """Up to three events; none where nothing changed."""
    events = [worker_pb2.BlockEvent(kind=worker_pb2.BlockEvent.KIND_CLEARED)] if change.is_cleared else []
    if change.removed:
        events.append(worker_pb2.BlockEvent(kind=worker_pb2.BlockEvent.KIND_REMOVED, short_hashes=change.removed))
    if change.stored:
        events.append(worker_pb2.BlockEvent(kind=worker_pb2.BlockEvent.KIND_STORED, short_hashes=change.stored))
    return events


def block_change_from_pb(events: Sequence[worker_pb2.BlockEvent]) -> BlockChange:
    """The events of one message, whatever their order. Raises ProtocolError where they are none of ours."""
    hashes = {event.kind: event.short_hashes for event in events}
    if len(hashes) < len(events) or not hashes.keys() <= set(worker_pb2.BlockEvent.Kind.values()[1:]):
        raise ProtocolError("the block events of a message must be cleared, removed or stored, each once at most")
    if any(len(joined) % SHORT_BYTES for joined in hashes.values()):
        raise ProtocolError(f"short hashes must have {SHORT_BYTES} bytes each")
    return BlockChange(
        is_cleared=worker_pb2.BlockEvent.KIND_CLEARED in hashes,
        removed=hashes.get(worker_pb2.BlockEvent.KIND_REMOVED, b""),
        stored=hashes.get(worker_pb2.BlockEvent.KIND_STORED, b""),
    )


def _terms_to_pb(terms: tuple[PredictedTerm, ...]) -> list[common_pb2.PredictedTerm]:
    return [to_message(common_pb2.PredictedTerm, "predicted", term) for term in terms]


def plan_to_pb(plan: Plan) -> common_pb2.Plan:
    """Without signature and block holders. Raises InvalidRequestError naming the field."""
    remaining_s = None if plan.deadline_remaining_s is None else max(plan.deadline_remaining_s, _SHORTEST_DEADLINE_S)
    return to_message(
        common_pb2.Plan,
        "plan",
        plan,
        prefill=[to_message(common_pb2.PlannedWorker, "plan.prefill", worker) for worker in plan.prefill],
        decode=to_message(common_pb2.PlannedWorker, "plan.decode", plan.decode),
        manifest=to_message(common_pb2.BlockManifest, "plan", plan),
        predicted=_terms_to_pb(plan.predicted),
        deadline_remaining_s=remaining_s,
    )


def plan_from_pb(message: common_pb2.Plan) -> Plan:
    """Not validated; raises ProtocolError where there is no decode worker."""
    if not message.HasField("decode"):
        raise ProtocolError(f"plan {message.plan_id!r} has no decode worker")
    return from_message(
        Plan,
        message,
        prefill=tuple(from_message(PlannedWorker, worker) for worker in message.prefill),
        decode=from_message(PlannedWorker, message.decode),
        predicted=tuple(from_message(PredictedTerm, term) for term in message.predicted),
        deadline_remaining_s=message.deadline_remaining_s or None,
        prompt_blocks=message.manifest.prompt_blocks,
        cached_blocks=message.manifest.cached_blocks,
    )


def receipt_to_pb(receipt: Receipt) -> common_pb2.Receipt:
    """Raises InvalidRequestError naming the field."""
    return to_message(common_pb2.Receipt, "receipt", receipt, predicted=_terms_to_pb(receipt.predicted))


def receipt_from_pb(message: common_pb2.Receipt) -> Receipt:
    """What the request cost."""
    return from_message(Receipt, message, predicted=tuple(from_message(PredictedTerm, term) for term in message.predicted))


def logprobs_to_pb(logprobs: Logprobs) -> common_pb2.Logprobs:
    """Raises InvalidRequestError naming the field."""
    return build(
        common_pb2.Logprobs,
        "logprobs",
        sampled=to_message(common_pb2.TokenLogprob, "logprobs.sampled", logprobs.sampled),
        top=[to_message(common_pb2.TokenLogprob, "logprobs.top", token) for token in logprobs.top],
    )


def logprobs_from_pb(message: common_pb2.Logprobs) -> Logprobs:
    """The sampled token's log probability (nats) and the best candidates'."""
    top = tuple(from_message(TokenLogprob, token) for token in message.top)
    return Logprobs(sampled=from_message(TokenLogprob, message.sampled), top=top)


def chunk_to_pb(chunk: Chunk) -> inference_pb2.GenerateResponse:
    """Raises InvalidRequestError naming the field."""
    return build(
        inference_pb2.GenerateResponse,
        "chunk",
        first_position=chunk.first_position,
        token_ids=chunk.token_ids,
        text=chunk.text,
        logprobs=[logprobs_to_pb(logprobs) for logprobs in chunk.logprobs],
        finish_reason=_FINISH_REASONS[chunk.finish_reason],
        stop_reason=chunk.stop_reason,
        usage=None if chunk.usage is None else to_message(common_pb2.Usage, "chunk.usage", chunk.usage),
        choice_index=chunk.choice_index,
    )


def chunk_from_pb(message: inference_pb2.GenerateResponse) -> Chunk:
    """Raises ProtocolError where the finish reason is unknown. An empty stop reason is None."""
    return Chunk(
        first_position=message.first_position,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(logprobs_from_pb(logprobs) for logprobs in message.logprobs),
        finish_reason=finish_reason_from_pb(message.finish_reason),
        stop_reason=message.stop_reason or None,
        usage=from_message(Usage, message.usage) if message.HasField("usage") else None,
        choice_index=message.choice_index,
    )


def request_to_worker_pb(request: Request, plan: Plan, attempt: int, incarnation: int) -> worker_pb2.WorkerGenerateRequest:
    """The request as a decode worker gets it, meant for its `incarnation`. Raises InvalidRequestError naming the field."""
    return to_message(
        worker_pb2.WorkerGenerateRequest,
        "",
        request,
        sampling=sampling_to_pb(request.sampling),
        plan=plan_to_pb(plan),
        attempt=attempt,
        incarnation=incarnation,
    )


def request_from_worker_pb(message: worker_pb2.WorkerGenerateRequest) -> Request:
    """The request without what only the router needs (slo, session, sheddable, expected length, tenant). Not validated."""
    return from_message(Request, message, sampling=sampling_from_pb(message.sampling))


def request_from_prefill_pb(message: worker_pb2.PrefillRequest) -> Request:
    """The request as far as a prefill worker knows it. Not validated; more resumed tokens than there are leave no prompt."""
    prompt_tokens = max(0, len(message.prompt_token_ids) - message.resumed_tokens)
    return from_message(
        Request,
        message,
        prompt_token_ids=tuple(message.prompt_token_ids[:prompt_tokens]),
        resume_token_ids=tuple(message.prompt_token_ids[prompt_tokens:]),
        sampling=sampling_from_pb(message.sampling),
    )
