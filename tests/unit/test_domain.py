"""A request is valid or names the field that is not; and it says itself why it cannot be handed off."""

from dataclasses import replace
from typing import Any

import pytest

from tandem.domain import (
    MAX_PREFILL_CANDIDATES,
    EngineInfo,
    ModelId,
    Plan,
    PlannedWorker,
    ReplicaId,
    Request,
    RequestId,
    Sampling,
    Slo,
    StructuredKind,
    StructuredOutput,
)
from tandem.errors import InvalidRequestError, Reason
from tests.unit.test_convert import ENGINE

REGEX = StructuredOutput(kind=StructuredKind.REGEX, value=("a*",))
REQUEST = Request(request_id=RequestId("r"), model=ModelId("m"), prompt_token_ids=(1, 2, 3))


def request(**changes: Any) -> Request:
    return replace(REQUEST, **changes)


def engine(**changes: Any) -> EngineInfo:
    return replace(ENGINE, **changes)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(max_tokens=1, min_tokens=1, temperature=0.0, top_p=1.0, top_k=2**31 - 1, logprobs=20),
        Sampling(temperature=0.1, n=16),
        Sampling(stop=("x" * 1024,) * 16, logit_bias={1: -100.0}, structured_output=REGEX),
    ],
)
def test_settings_within_their_limits_are_valid(sampling: Sampling) -> None:
    sampling.validate()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": float("inf")},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"min_tokens": -1},
        {"min_tokens": 3, "max_tokens": 2},
        {"top_k": -1},
        {"top_k": 2**31},
        {"n": 0},
        {"n": 17},
        {"logprobs": -1},
        {"logprobs": 21},
        {"stop": ("a",) * 17},
        {"stop": ("",)},
        {"stop": ("x" * 1025,)},
        {"logit_bias": {1: float("nan")}},
        {"structured_output": StructuredOutput(kind=StructuredKind.GRAMMAR, value=("",))},
    ],
)
def test_a_setting_outside_its_limit_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Sampling(**settings).validate()
    assert caught.value.field == f"sampling.{next(iter(settings))}"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"seed": 1, "temperature": 0.0}, None),
        ({"n": 2}, "n"),
        ({"structured_output": REGEX, "seed": 1, "presence_penalty": 0.1, "repetition_penalty": 1.1}, None),
    ],
)
def test_what_cannot_be_handed_off_exactly_says_why(settings: dict[str, Any], reason: str | None) -> None:
    assert Sampling(**settings).one_worker_reason() == reason


def test_a_request_within_the_engine_s_limits_is_valid() -> None:
    full = request(
        prompt_token_ids=(0,) * 511,
        sampling=Sampling(max_tokens=512, stop_token_ids=(99,), logit_bias={99: 1.0}),
    )
    full.validate(ENGINE)
    assert full.max_output_tokens(ENGINE) == 1
    request(resume_token_ids=(1, 2), sampling=Sampling(max_tokens=3)).validate(ENGINE)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt_token_ids": ()}, "prompt"),
        ({"prompt_token_ids": (100,)}, "prompt.token_ids"),
        ({"prompt_token_ids": (-1,)}, "prompt.token_ids"),
        ({"prompt_token_ids": (1,) * 512}, "prompt"),
        ({"resume_token_ids": (100,)}, "resume_token_ids"),
        ({"resume_token_ids": (1, 2), "sampling": Sampling(max_tokens=2)}, "resume_token_ids"),
        ({"sampling": Sampling(stop_token_ids=(100,))}, "sampling.stop_token_ids"),
        ({"sampling": Sampling(logit_bias={100: 1.0})}, "sampling.logit_bias"),
        ({"sampling": Sampling(max_tokens=513)}, "sampling.max_tokens"),
        ({"sampling": Sampling(n=0)}, "sampling.n"),
        ({"sampling": Sampling(n=2, temperature=0.0)}, "sampling.n"),
    ],
)
def test_a_request_outside_them_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request(**changes).validate(ENGINE)
    assert caught.value.field == field


def test_a_prompt_that_fills_the_context_has_a_reason_of_its_own() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request(prompt_token_ids=(1,) * 512).validate(ENGINE)
    assert caught.value.reason is Reason.PROMPT_TOO_LONG


def test_tokens_are_counted_with_the_resumed_ones() -> None:
    resumed = request(resume_token_ids=(4, 5))
    assert resumed.total_tokens == 5
    assert resumed.max_output_tokens(engine(context_tokens=10)) == 7
    assert request(sampling=Sampling(max_tokens=4)).max_output_tokens(engine(context_tokens=10)) == 4


@pytest.mark.parametrize("value", [(), ("",), ("yes", "")])
def test_an_empty_constraint_is_refused(value: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="structured_output"):
        StructuredOutput(kind=StructuredKind.CHOICE, value=value).validate()


def test_a_json_object_needs_no_value() -> None:
    Sampling(structured_output=StructuredOutput(kind=StructuredKind.JSON_OBJECT)).validate()


@pytest.mark.parametrize("bad_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_objective_that_is_no_time_is_refused(bad_s: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"slo\.ttft_s"):
        Slo(ttft_s=bad_s).validate()
    Slo(ttft_s=0.5, tpot_s=0.02).validate()


WORKER = PlannedWorker(replica_id=ReplicaId("prefill-0"), incarnation=1, address="host:1")


def test_a_plan_as_routers_make_it_is_valid() -> None:
    Plan(plan_id="p", decode=WORKER, prefill=(WORKER,) * MAX_PREFILL_CANDIDATES, slack_s=-5.0).validate()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prefill": (WORKER,) * (MAX_PREFILL_CANDIDATES + 1)}, "plan.prefill"),
        ({"prefill": (replace(WORKER, address=""),)}, "plan.prefill"),
        ({"prefill": (replace(WORKER, address="a:1,b:1"),)}, "plan.prefill"),
        ({"slack_s": float("nan")}, "plan.slack_s"),
        ({"slack_s": float("inf")}, "plan.slack_s"),
    ],
)
def test_a_plan_that_no_router_makes_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        replace(Plan(plan_id="p", decode=WORKER), **changes).validate()
    assert caught.value.field == field
