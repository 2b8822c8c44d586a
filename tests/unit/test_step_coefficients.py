"""Coefficients that routers publish: read as they were written, the impossible dropped and counted."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tandem.domain import ModelId, Role
from tandem.step_coefficients import Coefficients, PoolCoefficients, coefficients_from_json, coefficients_to_json
from tandem.step_cost import StepCost

COST = StepCost(base_s=1e-3, token_s=6e-5, pair_s=0.0, request_s=2e-4, kv_token_s=1e-8)
PREFILL = PoolCoefficients(model=ModelId("m"), hardware="cpu", role=Role.PREFILL, cost=COST, p90_ratio=1.2, samples=100)
DECODE = replace(PREFILL, role=Role.DECODE)


def changed(**changes: Any) -> str:
    """A text with a good entry and one that was changed; a value of None: the key is not there."""
    values = json.loads(coefficients_to_json([DECODE, PREFILL]))
    entry = values["pools"][1]
    for name, value in changes.items():
        place = entry["cost"] if name in entry["cost"] else entry
        place[name] = value
        if value is None:
            del place[name]
    return json.dumps(values)


def test_what_was_written_is_read() -> None:
    assert coefficients_from_json([coefficients_to_json([PREFILL, DECODE])]) == Coefficients(pools=(DECODE, PREFILL), dropped=0)


def test_nobody_has_written() -> None:
    assert coefficients_from_json([]) == Coefficients(pools=(), dropped=0)


def test_of_several_routers_the_one_that_has_seen_most_steps_counts() -> None:
    others = [replace(PREFILL, samples=samples, p90_ratio=float(samples)) for samples in (50, 200, 150, 200)]
    texts = [coefficients_to_json([one]) for one in (PREFILL, *others)]
    assert coefficients_from_json(texts).pools == (others[1],)


@pytest.mark.parametrize(
    "change",
    [
        {"base_s": -1e-9},
        {"token_s": float("nan")},
        {"pair_s": float("inf")},
        {"request_s": "1"},
        {"kv_token_s": True},
        {"kv_token_s": 10**400},
        {"kv_token_s": None},
        {"p90_ratio": 0.0},
        {"p90_ratio": -1.0},
        {"samples": 0},
        {"samples": 1.5},
        {"samples": True},
        {"model": 7},
        {"hardware": None},
        {"role": "other"},
        {"role": ["prefill"]},
        {"cost": 1},
        {"base_s": 0, "token_s": 0, "pair_s": 0, "request_s": 0, "kv_token_s": 0},
    ],
)
def test_an_impossible_entry_is_dropped_and_counted_and_its_neighbour_is_not(change: dict[str, Any]) -> None:
    assert coefficients_from_json([changed(**change)]) == Coefficients(pools=(DECODE,), dropped=1)


def test_what_a_newer_router_adds_is_passed_over() -> None:
    assert coefficients_from_json([changed(more=1)]) == Coefficients(pools=(DECODE, PREFILL), dropped=0)


@pytest.mark.parametrize("text", ["", "{", "7", "[]", "{}", '{"version":1}', '{"version":1,"pools":7}', '{"version":2,"pools":[]}'])
def test_a_text_that_is_none_or_of_another_version_is_one_dropped_entry(text: str) -> None:
    good = coefficients_to_json([PREFILL])
    assert coefficients_from_json([text, good]) == Coefficients(pools=(PREFILL,), dropped=1)


def test_an_entry_that_is_no_object_is_dropped() -> None:
    assert coefficients_from_json(['{"version":1,"pools":[7]}']) == Coefficients(pools=(), dropped=1)
