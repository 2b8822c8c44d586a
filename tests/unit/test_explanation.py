"""Why a request went where it went, to be asked for afterwards."""

import pytest

from router.config import RouterConfig
from router.core import RouterCore
from router.decisions import Decisions
from router.server import RouterService
from router.shell import RouterShell
from tandem.domain import Receipt, RequestId
from tandem.errors import NotFoundError
from tandem.explain_cli import candidates_table, outcome_table
from tandem.explanation import Explanation, explanation_from_pb, explanation_to_pb
from tandem.rpc import ServerCall
from tandem.v1 import router_pb2
from tests.core_talk import R1, make_core, only_dispatch, submit

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
    core = make_core(replicas=("prefill-0", "prefill-1", "decode-0"))
    plan = only_dispatch(submit(core)).plan
    found = await explained(core)
    assert found.plan.prefill == plan.prefill
    assert [candidate.worker.replica_id for candidate in found.candidates] == ["prefill-0", "prefill-1"]
    assert [candidate.is_chosen for candidate in found.candidates] == [True, False]
    first = found.candidates[0]
    assert first.term("total_s") == pytest.approx((first.term("ahead_s") or 0.0) + (first.term("own_s") or 0.0))
    assert first.term("nothing") is None
    assert found.receipt is None
    assert "not ended" in str(outcome_table(found).title)
    assert candidates_table(found).row_count == 2


async def test_one_worker_for_all_is_told_apart() -> None:
    core = make_core()
    submit(core, prompt_tokens=10)
    found = await explained(core)
    assert [(one.worker.replica_id, one.is_one_worker, one.is_chosen) for one in found.candidates] == [("decode-0", True, True)]
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
    with pytest.raises(NotFoundError, match="'r9'"):
        await explained(make_core(), "r9")


def test_the_oldest_decision_is_forgotten_and_the_last_attempt_counts() -> None:
    core = make_core(config=RouterConfig(one_worker_max_tokens=0, max_explained_requests=1))
    submit(core)
    submit(core, "r2")
    assert core.decisions.get(R1) is None
    core.finished(R1, 1, Receipt(request_id=R1), 1.0)
    assert len(core.decisions) == 1
    assert core.decisions.get(RequestId("r2")) is not None
    decision = core.decisions.get(RequestId("r2"))
    assert decision is not None
    again = Decisions(2)
    again.placed(R1, decision.plan, decision.placement)
    again.placed(R1, decision.plan, decision.placement)
    assert len(again) == 1
