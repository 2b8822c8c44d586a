"""A line against a plain sort: whatever came and went, the next is who a sort of all that wait puts first."""

from hypothesis import given
from hypothesis import strategies as st

from router.line import Line, Waiting
from tandem.domain import RequestId
from tests.router_parts import FixedShares

SECONDS = st.integers(0, 40).map(lambda quarters: quarters / 4)  # exact, and often equal
SHARES = FixedShares("b", "c")  # then "a"


@st.composite
def waits(draw: st.DrawFn, *, is_shortest: bool) -> list[Waiting]:
    found = []
    for number in range(draw(st.integers(1, 25))):
        latest_start_s = draw(SECONDS)
        found.append(
            Waiting(
                request_id=RequestId(f"r{number}"),
                tenant=draw(st.sampled_from("abc")),
                priority=draw(st.integers(-1, 1)),
                arrival=draw(st.integers(1, 5)),
                latest_start_s=latest_start_s,
                rank_s=100.0 + draw(SECONDS) if is_shortest else latest_start_s,
                work_s=draw(SECONDS),
                tokens=draw(st.integers(0, 9)),
                has_objective=draw(st.booleans()),
            )
        )
    return found


def plain_first(waiting: list[Waiting], now_s: float, *, is_shortest: bool) -> Waiting:
    """By the words of the rule: class, in time before late, tenant, rank; late ones by their tenant's share."""
    tenants = SHARES.order({one.tenant for one in waiting})

    def place(one: Waiting) -> tuple[int, bool, int, float, int, str]:
        is_late = one.has_objective and not is_shortest and one.latest_start_s < now_s
        return one.priority, is_late, tenants.index(one.tenant), one.rank_s, one.arrival, one.request_id

    return min(waiting, key=place)


@given(data=st.data(), is_shortest=st.booleans())
def test_the_next_is_who_a_plain_sort_puts_first(data: st.DataObject, is_shortest: bool) -> None:
    line, here = Line(), dict[RequestId, Waiting]()
    for one in data.draw(waits(is_shortest=is_shortest)):
        line.add(one)
        here[one.request_id] = one
        if data.draw(st.booleans(), label="one leaves"):
            leaver = data.draw(st.sampled_from(sorted(here)))
            assert line.remove(leaver) == here.pop(leaver)
        line.check_invariants()
    now_s = 0.0
    while here:
        now_s += data.draw(SECONDS, label="time passes")
        first = line.first(now_s, SHARES)
        assert first == plain_first(list(here.values()), now_s, is_shortest=is_shortest)
        assert line.work_before_s(first.priority, first.tenant, first.work_s, SHARES) <= line.work_s
        line.remove(first.request_id)
        del here[first.request_id]
        line.check_invariants()
    assert line.first(now_s, SHARES) is None
    assert (len(line), line.tokens, line.work_s) == (0, 0, 0.0)
