"""Why a request went where it went, to be asked for afterwards."""

import gc
from dataclasses import replace

import pytest

from router.config import RouterConfig
from router.core import RouterCore
from router.decisions import Decisions
from router.server import RouterService
from router.shell import RouterShell
from tandem.domain import ModelId, PredictedTerm, Receipt, ReplicaId, Request, RequestId, RequestState
from tandem.errors import NotFoundError, ProtocolError, Reason
from tandem.explain_cli import candidates_table, decode_table, outcome_table
from tandem.explanation import Explanation, Part, explanation_from_pb, explanation_to_pb
from tandem.rpc import ServerCall
from tandem.v1 import router_pb2
from tests.core_talk import LOST, R1, make_core, only_dispatch, only_reject, submit

ANY_CALL: ServerCall = object.__new__(ServerCall)


class OnlyCore(RouterShell):
    def __init__(self, core: RouterCore) -> None:
        self.core = core


async def explained(core: RouterCore, request_id: str = "r1") -> Explanation:
    answer = await RouterService(OnlyCore(core)).explain(router_pb2.ExplainRequest(request_id=request_id), ANY_CALL)
    found = explanation_from_pb(router_pb2.ExplainResponse.FromString(answer.SerializeToString()))
    assert explanation_from_pb(explanation_to_pb(found)) == found
    return found


async def test_candidates_come_with_their_terms_and_the_chosen_one_is_marked() -> None:
    core = make_core(replicas=("prefill-0", "prefill-1", "decode-0", "decode-1"))
    plan = only_dispatch(submit(core)).plan
    found = await explained(core)
    assert found.plan is not None
    assert found.plan.prefill == plan.prefill
    assert [(one.worker.replica_id, one.part) for one in found.candidates] == [
        ("prefill-0", Part.PREFILL),
        ("prefill-1", Part.PREFILL),
        ("decode-0", Part.DECODE),
        ("decode-1", Part.DECODE),
    ]
    assert [candidate.is_chosen for candidate in found.candidates] == [True, False, True, False]
    first = found.candidates[0]
    assert first.term("total_s") == pytest.approx((first.term("ahead_s") or 0.0) + (first.term("own_s") or 0.0))
    assert first.term("nothing") is None
    assert found.receipt is None
    assert (found.state, outcome_table(found).title) == (RequestState.RUNNING, "predicted")
    assert candidates_table(found).row_count == 2
    decode = found.candidates[2]
    assert (decode.term("running_requests"), decode.term("is_too_slow")) == (0.0, 0.0)
    tpot_s, gap_s, rest_s = (decode.term(name) or 0.0 for name in ("tpot_s", "handoff_gap_s", "rest_s"))
    output_tokens = next(term.predicted for term in plan.predicted if term.name == "output_tokens")
    assert rest_s == pytest.approx(tpot_s * output_tokens + gap_s)
    assert rest_s > gap_s > 0.0
    assert decode_table(found).row_count == 2


async def test_the_terms_that_are_shown_add_up_where_blocks_are_fetched() -> None:
    core = make_core()
    submit(core)
    found = await explained(core)
    waits = {"ahead_s": 1.0, "wait_s": 2.0, "own_s": 4.0, "others_s": 8.0, "total_s": 15.0, "cached_tokens": 64.0, "fetched_tokens": 32.0}
    terms = tuple(PredictedTerm(name=name, predicted=value) for name, value in waits.items())
    table = candidates_table(replace(found, candidates=(replace(found.candidates[0], terms=terms),)))
    shown = {str(column.header): next(iter(column.cells)) for column in table.columns}
    assert float(str(shown["total_s"])) == sum(float(str(shown[name])) for name in ("ahead_s", "wait_s", "own_s", "others_s"))
    assert (shown["cached_tokens"], shown["fetched_tokens"]) == ("64", "32")


async def test_one_worker_for_all_is_told_apart() -> None:
    core = make_core()
    submit(core, prompt_tokens=10)
    found = await explained(core)
    assert [(one.worker.replica_id, one.part, one.is_chosen) for one in found.candidates] == [("decode-0", Part.BOTH, True)]
    assert "short_prompt" in str(candidates_table(found).title)


async def test_what_it_came_to_stands_beside_what_was_predicted() -> None:
    core = make_core()
    plan = only_dispatch(submit(core)).plan
    core.finished(R1, 1, Receipt(request_id=R1, ttft_s=0.5, predicted=plan.predicted), 1.0)
    found = await explained(core)
    assert found.receipt is not None
    assert found.receipt.ttft_s == 0.5
    assert outcome_table(found).row_count == len(plan.predicted)


async def test_a_request_that_is_not_remembered_is_named() -> None:
    with pytest.raises(NotFoundError, match="no request 'r9' is among the last 1000 of this router"):
        await explained(make_core(), "r9")


@pytest.mark.parametrize(
    ("own_ids", "seen_id", "found_id"),
    [
        (["a"], "a", "a"),
        (["a"], "chatcmpl-a", "a"),
        (["a-0123abcd"], "a", "a-0123abcd"),
        (["a-0123abcd"], "cmpl-a", "a-0123abcd"),
        (["a-0123abcd", "a-4567cdef"], "a", "a-4567cdef"),
        (["a-0", "a-1"], "a", "a-1"),
        (["a#0", "a#1"], "a", "a#0"),
        (["a#1"], "a", "a#1"),
        (["a-0123abcd-0#0", "a-0123abcd-1#0", "a-0123abcd-1#1"], "a", "a-0123abcd-1#0"),
        (["a", "a#0"], "a", "a"),
        ([115 * "x" + "-0123abcd-127"], 124 * "x", 115 * "x" + "-0123abcd-127"),
        ([126 * "x" + "#0"], 128 * "x", 126 * "x" + "#0"),
    ],
)
async def test_a_request_is_found_by_the_id_that_its_caller_saw(own_ids: list[str], seen_id: str, found_id: str) -> None:
    core = make_core()
    for own_id in own_ids:
        submit(core, own_id)
    assert (await explained(core, seen_id)).request_id == found_id


@pytest.mark.parametrize("own_id", ["ab", "a-b", "a-1234", "a#0-0", "a-0123abcde", "b-0123abcd", ""])
async def test_an_id_that_only_begins_alike_is_another_requests(own_id: str) -> None:
    core = make_core()
    submit(core, own_id)
    with pytest.raises(NotFoundError):
        await explained(core, "a")


async def test_a_request_that_waits_is_explained_by_the_line_it_waits_in() -> None:
    core = make_core(config=RouterConfig(one_worker_max_tokens=0, max_running_requests=1))
    submit(core)
    submit(core, "r2")
    found = await explained(core, "r2")
    assert (found.state, found.plan, found.reason) == (RequestState.WAITING, None, "")
    assert [(one.worker.replica_id, one.part, one.is_chosen) for one in found.candidates] == [("prefill-0", Part.PREFILL, True)]
    assert "r2: waiting, in the line of prefill-0" in str(candidates_table(found).title)
    assert [term.name for term in found.predicted] == ["queue_s", "ttft_s", "ttft_q90_s"]
    assert outcome_table(found).row_count == 3
    core.cancelled(R1, 1.0)
    assert (await explained(core, "r2")).state is RequestState.RUNNING


async def test_a_request_without_a_worker_waits_in_no_line() -> None:
    core = make_core(replicas=("decode-0",))
    core.models_held([ModelId("m")], {})
    core.replica_lost(ReplicaId("decode-0"), 1, 0.0)
    submit(core)
    found = await explained(core)
    assert (found.state, found.plan, found.candidates, found.predicted) == (RequestState.WAITING, None, (), ())
    assert str(candidates_table(found).title) == "r1: waiting"
    assert outcome_table(found).row_count == 0


async def test_a_refused_request_is_explained_by_its_error() -> None:
    core = make_core(config=RouterConfig(max_running_requests=1, max_queued_requests=0))
    submit(core)
    rejected = only_reject(submit(core, "r2"))
    found = await explained(core, "r2")
    assert (found.state, found.reason, found.message) == (RequestState.REFUSED, Reason.QUEUE_FULL, rejected.error.message)
    assert (found.plan, found.candidates) == (None, ())


async def test_a_request_that_waited_in_vain_shows_where() -> None:
    core = make_core(config=RouterConfig(one_worker_max_tokens=0, max_running_requests=1))
    submit(core)
    submit(core, "r2", deadline_s=1.0)
    core.tick(2.0)
    found = await explained(core, "r2")
    assert (found.state, found.reason) == (RequestState.REFUSED, Reason.DEADLINE)
    assert [one.worker.replica_id for one in found.candidates] == ["prefill-0"]


async def test_a_failed_attempt_waits_again_or_ends_the_request() -> None:
    core = make_core(replicas=("decode-0",), config=RouterConfig(retry_budget=1))
    submit(core)
    core.failed(R1, 1, LOST, 1.0)
    found = await explained(core)
    assert found.state is RequestState.WAITING
    assert found.plan is not None  # of the last attempt
    assert "in the line of" not in str(candidates_table(found).title)  # the only workers are left out for a while
    core.tick(10.0)
    assert (await explained(core)).state is RequestState.RUNNING
    core.failed(R1, 2, LOST, 11.0)
    found = await explained(core)
    assert (found.state, found.message) == (RequestState.FAILED, LOST.message)
    assert found.plan is not None


async def test_a_caller_that_goes_away_is_told_apart() -> None:
    core = make_core()
    submit(core)
    core.cancelled(R1, 1.0)
    found = await explained(core)
    assert (found.state, found.reason, found.receipt) == (RequestState.CANCELLED, "", None)


async def test_who_is_refused_under_the_id_of_a_running_request_does_not_hide_it() -> None:
    core = make_core()
    submit(core)
    core.decisions.refused(R1, LOST, None)
    assert (await explained(core)).state is RequestState.RUNNING
    core.finished(R1, 1, Receipt(request_id=R1), 1.0)
    core.decisions.refused(R1, LOST, None)
    assert (await explained(core)).state is RequestState.REFUSED


def test_what_is_remembered_of_a_refused_request_does_not_keep_its_prompt() -> None:
    core = make_core(config=RouterConfig(max_running_requests=1, max_queued_requests=0))
    submit(core)
    refused = RequestId("refused here and nowhere else")  # other tests' requests may live on in this process
    only_reject(submit(core, refused))
    gc.collect()
    assert core.decisions.get(refused) is not None
    assert not [one for one in gc.get_objects() if type(one) is Request and one.request_id == refused]


def test_a_state_that_is_not_known_is_refused() -> None:
    with pytest.raises(ProtocolError, match="unknown state 'lost'"):
        explanation_from_pb(router_pb2.ExplainResponse(request_id="r1", state="lost"))


def test_the_oldest_decision_is_forgotten_and_the_last_attempt_counts() -> None:
    core = make_core(config=RouterConfig(one_worker_max_tokens=0, max_explained_requests=1))
    submit(core)
    submit(core, "r2")
    assert core.decisions.get(R1) is None
    core.finished(R1, 1, Receipt(request_id=R1), 1.0)
    assert len(core.decisions) == 1
    decision = core.decisions.get(RequestId("r2"))
    assert decision is not None
    tracked, plan, placement = decision.tracked, decision.plan, decision.placement
    assert tracked is not None
    assert plan is not None
    assert placement is not None
    again = Decisions(2)
    again.placed(tracked, plan, placement)
    again.placed(tracked, plan, placement)
    assert len(again) == 1
