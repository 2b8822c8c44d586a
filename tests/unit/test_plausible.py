"""Reports with impossible numbers are not believed."""

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest

from router.plausible import is_possible_load, possible_steps
from tandem.domain import ReplicaId, WorkerLoad
from tandem.step_sample import StepSample
from tests.core_talk import make_core
from tests.samples import ENGINE

LOAD = WorkerLoad(running_requests=3, waiting_requests=1, pending_prefill_tokens=500, kv_used_fraction=0.5, kv_tokens=900)
STEP = StepSample(prefill_tokens=64, prefill_pairs=2048, decode_requests=2, kv_tokens=100, duration_s=0.01)


def test_what_a_replica_usually_says_is_possible() -> None:
    assert is_possible_load(LOAD, ENGINE)
    assert is_possible_load(WorkerLoad(), ENGINE)
    assert possible_steps([STEP], ENGINE) == [STEP]


@pytest.mark.parametrize(
    "impossible",
    [
        {"kv_used_fraction": nan},
        {"kv_used_fraction": -0.1},
        {"kv_used_fraction": 1.5},
        {"running_requests": 10**9},
        {"waiting_requests": 10**9},
        {"pending_prefill_tokens": 10**15},
        {"kv_tokens": 10**15},
    ],
    ids=lambda one: next(iter(one)),
)
def test_impossible_totals_are_dropped(impossible: dict[str, Any]) -> None:
    load = replace(LOAD, **impossible)
    assert not is_possible_load(load, ENGINE)
    core = make_core()
    assert not core.report(ReplicaId("decode-0"), 1, 1, load, ())
    assert core.replicas(0.0)[0].load == WorkerLoad()


@pytest.mark.parametrize(
    "impossible",
    [
        {"duration_s": nan},
        {"duration_s": inf},
        {"duration_s": 0.0},
        {"prefill_tokens": 10**9},
        {"prefill_pairs": 10**12},
        {"decode_requests": 10**6},
        {"kv_tokens": 10**12},
        {"prefill_tokens": 0, "prefill_pairs": 0, "decode_requests": 0, "kv_tokens": 0},
    ],
)
def test_impossible_steps_are_dropped_and_the_others_learnt_from(impossible: dict[str, Any]) -> None:
    step = replace(STEP, **impossible)
    assert possible_steps([step, STEP], ENGINE) == [STEP]
    core = make_core()
    assert not core.steps(ReplicaId("decode-0"), 1, [step, STEP], 0.0)
    assert core.predictor.pools.reports()[0].observations == 1


def test_reports_of_unknown_replicas_and_of_other_incarnations_are_dropped() -> None:
    core = make_core()
    assert not core.report(ReplicaId("decode-9"), 1, 1, LOAD, ())
    assert not core.report(ReplicaId("decode-0"), 2, 1, LOAD, ())
