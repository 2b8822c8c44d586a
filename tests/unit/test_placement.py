"""What a choice was made from can be read from it."""

import pytest

from router.placement import Considered
from tandem.domain import Role
from tests.router_parts import RouterParts, make_tracked
from tests.samples import make_lease


def test_candidates_are_compared_by_the_seconds_ahead_their_own_and_those_they_cost_others() -> None:
    one = Considered(
        lease=make_lease(), cached_tokens=32, fetched_tokens=16, ahead_s=0.5, wait_s=2.0, own_s=0.25, others_s=1.0, is_one_worker=True
    )
    assert one.total_s == 3.75
    terms = {term.name: (term.predicted, term.actual) for term in one.terms()}
    assert terms == {
        "ahead_s": (0.5, None),
        "wait_s": (2.0, None),
        "own_s": (0.25, None),
        "others_s": (1.0, None),
        "total_s": (3.75, None),
        "cached_tokens": (32.0, None),
        "fetched_tokens": (16.0, None),
    }


@pytest.mark.parametrize(("prompt_tokens", "role"), [(192, Role.PREFILL), (10, Role.DECODE)])
def test_the_prompt_is_computed_by_the_first_prefill_worker_or_else_by_the_decode_worker(prompt_tokens: int, role: Role) -> None:
    placement = RouterParts("prefill-0", "prefill-1", "decode-0").place(make_tracked(prompt_tokens=prompt_tokens))
    assert placement.worker == placement.assignment.worker
    assert placement.worker.role is role
