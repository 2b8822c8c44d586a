"""Every domain value comes back from its message as it was, and what a message cannot hold is refused by name."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TypeVar

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from tandem import convert
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
from tandem.step_sample import StepSample
from tandem.v1 import worker_pb2

T = TypeVar("T")
M = TypeVar("M", bound=Message)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
real = st.floats(allow_nan=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
word = text.filter(bool)
ids = st.lists(u32, max_size=5).map(tuple)
DRAWN_BY_TYPE = {int: u32, float: real, str: text, bool: st.booleans()}


def drawn(kind: type[T], **given_fields: st.SearchStrategy[object]) -> st.SearchStrategy[T]:
    """Instances of a dataclass: plain fields by their type, the others as given."""
    plain = {field.name: DRAWN_BY_TYPE[field.type] for field in fields(kind) if field.type in DRAWN_BY_TYPE}  # type: ignore[arg-type]
    return st.builds(kind, **{**plain, **given_fields})


structured = st.one_of(
    st.builds(
        StructuredOutput,
        kind=st.sampled_from([StructuredKind.JSON_SCHEMA, StructuredKind.REGEX, StructuredKind.GRAMMAR]),
        value=st.tuples(text),
    ),
    st.builds(StructuredOutput, kind=st.just(StructuredKind.CHOICE), value=st.lists(text).map(tuple)),
    st.just(StructuredOutput(kind=StructuredKind.JSON_OBJECT, value=())),
)
sampling = drawn(
    Sampling,
    max_tokens=st.none() | u32,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(text).map(tuple),
    stop_token_ids=ids,
    logprobs=st.none() | u32,
    logit_bias=st.dictionaries(u32, real, max_size=3),
    structured_output=st.none() | structured,
)
slo = st.builds(Slo, ttft_s=st.none() | real, tpot_s=st.none() | real)
engine_info = drawn(EngineInfo, kv_blocks=u64, kv_block_bytes=u64, eos_token_ids=ids)
lease = drawn(
    Lease,
    replica_id=text,
    incarnation=u64,
    role=st.sampled_from(Role),
    model=text,
    namespace=text,
    engine=engine_info,
    state=st.sampled_from(ReplicaState),
)
load = drawn(WorkerLoad)
planned_worker = drawn(PlannedWorker, replica_id=text, incarnation=u64)
terms = st.lists(drawn(PredictedTerm, actual=st.none() | real), max_size=2).map(tuple)
plan = drawn(
    Plan,
    decode=planned_worker,
    prefill=st.lists(planned_worker, max_size=2).map(tuple),
    deadline_remaining_s=st.none() | st.floats(min_value=1e-9, allow_nan=False),
    predicted=terms,
)
receipt = drawn(
    Receipt,
    request_id=text,
    kv_bytes_shipped=u64,
    predicted=terms,
    not_exact=st.lists(text, max_size=2).map(tuple),
)
token_logprob = drawn(TokenLogprob)
logprobs = st.builds(Logprobs, sampled=token_logprob, top=st.lists(token_logprob, max_size=2).map(tuple))
chunk = drawn(
    Chunk,
    token_ids=ids,
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | word,
    usage=st.none() | drawn(Usage),
)
request = drawn(
    Request,
    request_id=text,
    model=text,
    prompt_token_ids=ids,
    sampling=sampling,
    resume_token_ids=ids,
    priority=st.integers(-(2**31), 2**31 - 1),
    sheddable=st.just(False),  # this and what follows is the router's, and no worker is told
    tenant=st.just("default"),
    slo=st.just(Slo()),
    session_id=st.just(""),
    expected_output_tokens=st.none(),
)


def assert_round_trip(value: T, to_pb: Callable[[T], M], from_pb: Callable[[M], T]) -> None:
    """Through the bytes, as between two processes."""
    message = to_pb(value)
    assert from_pb(type(message).FromString(message.SerializeToString())) == value


@given(sampling)
def test_sampling_comes_back(value: Sampling) -> None:
    assert_round_trip(value, convert.sampling_to_pb, convert.sampling_from_pb)


@given(slo)
def test_slo_comes_back(value: Slo) -> None:
    assert_round_trip(value, convert.slo_to_pb, convert.slo_from_pb)


@given(engine_info)
def test_engine_info_comes_back(value: EngineInfo) -> None:
    assert_round_trip(value, convert.engine_info_to_pb, convert.engine_info_from_pb)


@given(lease)
def test_lease_comes_back(value: Lease) -> None:
    assert_round_trip(value, convert.lease_to_pb, convert.lease_from_pb)


@given(load)
def test_load_comes_back(value: WorkerLoad) -> None:
    assert_round_trip(value, convert.load_to_pb, convert.load_from_pb)


@given(drawn(StepSample, prefill_pairs=u64))
def test_a_step_comes_back(value: StepSample) -> None:
    assert_round_trip(value, convert.step_to_pb, convert.step_from_pb)


@given(plan)
def test_plan_comes_back(value: Plan) -> None:
    assert_round_trip(value, convert.plan_to_pb, convert.plan_from_pb)


@given(receipt)
def test_receipt_comes_back(value: Receipt) -> None:
    assert_round_trip(value, convert.receipt_to_pb, convert.receipt_from_pb)


@given(logprobs)
def test_logprobs_come_back(value: Logprobs) -> None:
    assert_round_trip(value, convert.logprobs_to_pb, convert.logprobs_from_pb)


@given(chunk)
def test_chunk_comes_back(value: Chunk) -> None:
    assert_round_trip(value, convert.chunk_to_pb, convert.chunk_from_pb)


@given(request, plan, u32, u64)
def test_request_comes_back_and_its_plan_with_it(value: Request, its_plan: Plan, attempt: int, incarnation: int) -> None:
    message = convert.request_to_worker_pb(value, its_plan, attempt, incarnation)
    assert convert.request_from_worker_pb(message) == value
    assert convert.plan_from_pb(message.plan) == its_plan
    assert (message.attempt, message.incarnation) == (attempt, incarnation)


COUNTS = [field.name for field in fields(WorkerLoad) if field.type is int]
OUT_OF_RANGE = st.integers(max_value=-1) | st.integers(min_value=2**64)


@given(st.sampled_from(COUNTS), OUT_OF_RANGE)
def test_a_count_out_of_range_is_refused_by_name(name: str, count: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert.load_to_pb(replace(WorkerLoad(), **{name: count}))
    assert caught.value.field == f"load.{name}"


SAMPLING_COUNTS = ("max_tokens", "min_tokens", "top_k", "logprobs", "n")


@given(st.sampled_from(SAMPLING_COUNTS), st.integers(max_value=-1) | st.integers(min_value=2**32))
def test_a_sampling_setting_out_of_range_is_refused_by_name(name: str, count: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        convert.sampling_to_pb(replace(Sampling(), **{name: count}))  # type: ignore[arg-type]
    assert caught.value.field == f"sampling.{name}"


@given(removed=st.binary(max_size=40), stored=st.binary(max_size=40), is_cleared=st.booleans())
def test_a_block_change_comes_back(removed: bytes, stored: bytes, is_cleared: bool) -> None:
    value = BlockChange(is_cleared=is_cleared, removed=removed[: len(removed) // 8 * 8], stored=stored[: len(stored) // 8 * 8])
    events = convert.block_change_to_pb(value)
    assert convert.block_change_from_pb(events) == value
    assert convert.block_change_from_pb(events[::-1]) == value
    if events:
        with pytest.raises(ProtocolError):
            convert.block_change_from_pb([*events, events[0]])
    with pytest.raises(ProtocolError):
        convert.block_change_from_pb([worker_pb2.BlockEvent()])
