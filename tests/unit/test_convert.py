"""What convert refuses, and what it does with absent fields."""

import pytest

from tandem import convert
from tandem.domain import (
    Chunk,
    EngineInfo,
    Lease,
    ModelId,
    Namespace,
    Plan,
    PlannedWorker,
    ReplicaId,
    Request,
    RequestId,
    Role,
    Sampling,
    StructuredKind,
    StructuredOutput,
)
from tandem.errors import InvalidRequestError, ProtocolError
from tandem.v1 import common_pb2, inference_pb2, worker_pb2

WORKER = PlannedWorker(replica_id=ReplicaId("d-0"), incarnation=3, address="127.0.0.1:1")
ENGINE = EngineInfo(
    block_size_tokens=16,
    context_tokens=512,
    vocabulary_tokens=100,
    kv_blocks=10,
    kv_block_bytes=1024,
    dtype="float32",
    engine="simulated",
    engine_version="1",
    eos_token_ids=(2,),
    max_num_seqs=8,
    max_num_batched_tokens=64,
)
LEASE = Lease(
    replica_id=ReplicaId("d-0"),
    incarnation=1,
    node="n",
    role=Role.DECODE,
    model=ModelId("m"),
    model_path="m",
    namespace=Namespace("00"),
    address="127.0.0.1:1",
    engine=ENGINE,
)


def refused_field(call: object, *arguments: object) -> str | None:
    """The field that an InvalidRequestError names."""
    assert callable(call)
    with pytest.raises(InvalidRequestError) as caught:
        call(*arguments)
    return caught.value.field


def test_absent_sampling_fields_keep_the_domain_defaults() -> None:
    assert convert.sampling_from_pb(common_pb2.Sampling()) == Sampling()


def test_zero_temperature_on_the_wire_is_zero_and_not_the_default() -> None:
    assert convert.sampling_from_pb(common_pb2.Sampling(temperature=0.0)).temperature == 0.0


def test_json_object_false_is_no_structured_output() -> None:
    assert convert.sampling_from_pb(common_pb2.Sampling(json_object=False)).structured_output is None


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(max_tokens=-1), "sampling.max_tokens"),
        (Sampling(n=2**32), "sampling.n"),
        (Sampling(seed=2**63), "sampling.seed"),
        (Sampling(stop_token_ids=(1, -1)), "sampling.stop_token_ids"),
        (Sampling(logit_bias={-1: 1.0}), "sampling.logit_bias"),
        (Sampling(stop=("\ud800",)), "sampling.stop"),
        (Sampling(temperature="hot"), "sampling.temperature"),  # type: ignore[arg-type]
        (Sampling(temperature=10**400), "sampling.temperature"),
        (Sampling(structured_output=StructuredOutput(kind=StructuredKind.REGEX, value=())), "sampling.structured_output"),
        (Sampling(structured_output=StructuredOutput(kind=StructuredKind.REGEX, value=("a", "b"))), "sampling.structured_output"),
        (Sampling(structured_output=StructuredOutput(kind=StructuredKind.REGEX, value=("\ud800",))), "sampling.regex"),
        (Sampling(structured_output=StructuredOutput(kind=StructuredKind.CHOICE, value=("\ud800",))), "sampling.structured_output.choices"),
    ],
)
def test_a_setting_that_its_type_cannot_hold_is_refused_by_name(sampling: Sampling, field: str) -> None:
    assert refused_field(convert.sampling_to_pb, sampling) == field


def test_a_request_names_the_field_that_does_not_fit() -> None:
    plan = Plan(plan_id="p", decode=WORKER)
    request = Request(request_id=RequestId("r"), model=ModelId("m"), prompt_token_ids=(1, -5))
    assert refused_field(convert.request_to_worker_pb, request, plan, 0, 0) == "prompt_token_ids"
    request = Request(request_id=RequestId("r"), model=ModelId("m"), prompt_token_ids=(1,), priority=2**31)
    assert refused_field(convert.request_to_worker_pb, request, plan, 0, 0) == "priority"


def test_the_message_of_a_refusal_does_not_repeat_long_values() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert.chunk_to_pb(Chunk(first_position=0, text="secret " * 1000 + "\ud800"))
    assert caught.value.field == "chunk.text"
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("remaining_s", [0.0, -1.0])
def test_an_expired_deadline_does_not_become_no_deadline(remaining_s: float) -> None:
    plan = convert.plan_from_pb(convert.plan_to_pb(Plan(plan_id="p", decode=WORKER, deadline_remaining_s=remaining_s)))
    assert plan.deadline_remaining_s is not None
    assert 0.0 < plan.deadline_remaining_s < 1e-6


def test_a_plan_without_a_decode_worker_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="no decode worker"):
        convert.plan_from_pb(worker_pb2.WorkerGenerateRequest().plan)


@pytest.mark.parametrize("missing", ["role", "state", "engine"])
def test_a_lease_without_role_state_or_engine_is_a_protocol_error(missing: str) -> None:
    message = convert.lease_to_pb(LEASE)
    message.ClearField(missing)
    with pytest.raises(ProtocolError):
        convert.lease_from_pb(message)


def test_an_enum_value_of_a_later_version_is_a_protocol_error() -> None:
    message = inference_pb2.GenerateResponse()
    message.finish_reason = 99  # type: ignore[assignment]
    with pytest.raises(ProtocolError, match="99"):
        convert.chunk_from_pb(message)


def test_a_prefill_request_is_prompt_and_resumed_tokens() -> None:
    message = worker_pb2.PrefillRequest(request_id="r", model="m", prompt_token_ids=[1, 2, 3], resumed_tokens=1, cache_salt="s")
    request = convert.request_from_prefill_pb(message)
    assert (request.request_id, request.model, request.cache_salt) == ("r", "m", "s")
    assert (request.prompt_token_ids, request.resume_token_ids) == ((1, 2), (3,))
    message.resumed_tokens = 7
    assert convert.request_from_prefill_pb(message).prompt_token_ids == ()
