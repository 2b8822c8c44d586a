"""Fair shares: what is charged, who goes first, who is forgotten."""

from router.tenants import FairShares, RouterShares


def active(*names: str, max_idle: int = 1024, **weights: float) -> FairShares:
    shares = FairShares(weights, max_idle=max_idle)
    for name in names:
        shares.activate(name)
    return shares


def test_an_output_token_costs_two_prompt_tokens_and_a_weight_divides() -> None:
    shares = active("a", "b", b=4.0)
    shares.charge_prompt("a", 100)
    shares.charge_output("a", 10)
    shares.charge_prompt("b", 100)
    assert (shares.counter("a"), shares.counter("b")) == (120.0, 25.0)


def test_the_least_served_goes_first_and_ties_go_by_name() -> None:
    shares = active("b", "a", "c")
    shares.charge_prompt("a", 1)
    assert shares.order(["c", "a", "b"]) == ["b", "c", "a"]
    assert shares.active == ("a", "b", "c")


def test_who_comes_new_or_back_is_lifted_to_the_least_served_that_is_active() -> None:
    shares = active("a", "b", "c")
    shares.deactivate("c")
    shares.charge_prompt("a", 500)
    shares.charge_prompt("b", 300)
    shares.activate("c")
    shares.activate("new")
    assert (shares.counter("c"), shares.counter("new")) == (300.0, 300.0)


def test_who_comes_back_further_on_than_the_others_stays_there() -> None:
    shares = active("a", "b")
    shares.charge_prompt("b", 300)
    shares.deactivate("b")
    shares.activate("b")
    assert shares.counter("b") == 300.0


def test_who_comes_when_nobody_is_active_begins_where_the_last_one_stood() -> None:
    shares = active("a")
    shares.charge_prompt("a", 700)
    shares.deactivate("a")
    shares.activate("b")
    shares.activate("a")
    assert (shares.counter("b"), shares.counter("a")) == (700.0, 700.0)


def test_a_second_request_of_an_active_tenant_changes_nothing() -> None:
    shares = active("a", "b")
    shares.charge_prompt("a", 5)
    shares.activate("b")
    shares.deactivate("nobody")
    assert (shares.counter("b"), shares.remembered) == (0.0, 0)


def test_what_still_streams_is_charged_to_an_idle_tenant_too() -> None:
    shares = active("a")
    shares.deactivate("a")
    shares.charge_output("a", 5)
    assert shares.counter("a") == 10.0


def test_of_too_many_idle_tenants_the_least_served_is_forgotten() -> None:
    shares = active("a", "b", "c", max_idle=2)
    for name, prompt in (("a", 30), ("b", 10), ("c", 20)):
        shares.charge_prompt(name, prompt)
    for name in ("a", "b", "c"):
        shares.deactivate(name)
    shares.charge_output("b", 5)
    assert shares.remembered == 2
    assert [shares.counter(name) for name in ("a", "b", "c")] == [30.0, 0.0, 20.0]


def told(*waiting: str, counters: dict[str, float] | None = None, floor: float = 0.0, **served: float) -> RouterShares:
    return RouterShares(served=served, counters=counters or {}, waiting=waiting, floor=floor)


def test_what_another_router_served_counts_here_too() -> None:
    shares = active("a", "b", b=2.0)
    shares.heard({"r2": told("a", a=1000.0)})
    assert shares.counter("a") == 0.0  # what it had served before is no news
    shares.charge_prompt("b", 100)
    shares.heard({"r2": told("a", a=1300.0, b=20.0)})
    assert (shares.counter("a"), shares.counter("b")) == (300.0, 70.0)
    assert shares.told(["b", "a"]) == told("a", "b", b=50.0, counters={"a": 300.0, "b": 70.0}, floor=70.0)
    assert shares.order(["a", "b"]) == ["b", "a"]


def test_a_tenant_that_is_ahead_of_one_that_waits_elsewhere_lets_it_go_first() -> None:
    shares = active("here")
    shares.heard({"r2": told("there", there=0.0)})
    shares.charge_prompt("here", 100)
    shares.heard({"r2": told("there", there=100.0)})
    assert not shares.must_wait("here")
    shares.charge_prompt("here", 100)
    assert not shares.must_wait("here")  # so much may have been served there since
    shares.charge_prompt("here", 101)
    assert shares.must_wait("here")
    assert not shares.must_wait("there")
    shares.heard({"r2": told("there", there=301.0)})
    assert not shares.must_wait("here")


def test_nobody_waits_for_a_router_that_is_silent_or_has_nobody_waiting() -> None:
    for quiet in ({}, {"r2": told(there=0.0)}):
        shares = active("here")
        shares.heard({"r2": told("there", there=0.0)})
        shares.charge_prompt("here", 100)
        assert shares.must_wait("here")
        shares.heard(quiet)
        assert not shares.must_wait("here")


def test_who_begins_to_wait_elsewhere_is_lifted_like_one_that_begins_here() -> None:
    shares = active("here")
    shares.charge_prompt("here", 500)
    shares.heard({"r2": told("there")})
    assert shares.counter("there") == 500.0
    shares.activate("there")
    shares.activate("new")
    assert (shares.counter("there"), shares.counter("new")) == (500.0, 500.0)


def test_who_waits_elsewhere_and_is_forgotten_here_holds_nobody_up() -> None:
    shares = active("a", "b", max_idle=0)
    shares.heard({"r2": told("c")})
    shares.charge_prompt("a", 10)
    shares.deactivate("b")
    assert not shares.must_wait("a") or shares.counter("c") < 10.0
    shares.deactivate("a")
    assert shares.remembered <= 1
    shares.charge_prompt("nobody", 5)
    assert "nobody" not in shares.told([]).served


def test_who_was_lifted_at_one_router_is_lifted_at_all() -> None:
    shares = active("a", "b", max_idle=2)
    shares.charge_prompt("a", 100)
    shares.heard({"r2": told("a", "b", counters={"a": 70.0, "b": 60.0, "c": 40.0, "d": 50.0, "e": 30.0})})
    assert [shares.counter(name) for name in "abcde"] == [100.0, 60.0, 40.0, 50.0, 0.0]  # of the others only so many are remembered
    shares.deactivate("b")
    shares.heard({"r2": told("a", counters={"b": 65.0})})
    assert (shares.counter("b"), shares.remembered) == (65.0, 2)


def test_two_routers_views_come_together_and_stay_together() -> None:
    views, served = [active("a", "b", b=3.0), active("a", b=3.0)], {"a": 0.0, "b": 0.0}
    views[0].charge_prompt("a", 5000)  # before either knows of the other
    views[1].charge_prompt("a", 3000)
    views[1].activate("b")
    for _ in range(400):
        told_now = [view.told(["a", "b"]) for view in views]
        views[0].heard({"r2": told_now[1]})
        views[1].heard({"r1": told_now[0]})
        for view in views:
            free = [tenant for tenant in view.order(["a", "b"]) if not view.must_wait(tenant)]
            view.charge_prompt(free[0], 100)
            served[free[0]] += 100
    for tenant in ("a", "b"):
        assert abs(views[0].counter(tenant) - views[1].counter(tenant)) <= 100
    assert abs(views[0].counter("a") - views[0].counter("b")) <= 200
    assert served["b"] / served["a"] > 3.0  # what was ahead is paid back


def test_a_tenant_begins_where_the_last_one_stood_at_any_router() -> None:
    shares = FairShares({})
    shares.heard({"r2": told(counters={"old": 900.0}, floor=900.0)})
    shares.activate("new")
    shares.activate("old")
    assert (shares.counter("new"), shares.counter("old")) == (900.0, 900.0)
    assert shares.told([]).floor == 900.0


def test_what_a_router_heard_of_a_third_is_not_counted_again() -> None:
    shares = active("a")
    shares.heard({"r2": told(counters={"a": 0.0}), "r3": told()})
    shares.heard({"r2": told(counters={"a": 500.0}), "r3": told(a=500.0, counters={"a": 500.0})})
    assert shares.counter("a") == 500.0


def test_who_waits_elsewhere_is_lifted_once_its_news_are_known() -> None:
    shares = active("x")
    shares.charge_prompt("x", 1000)
    shares.heard({"r2": told()})
    shares.heard({"r2": told("w", w=800.0)})
    assert shares.counter("w") == 1000.0


def test_all_since_the_start_is_no_step() -> None:
    shares = active("here")
    shares.charge_prompt("here", 1_000_000)
    shares.heard({"r2": told("there", counters={"there": 10.0})})
    shares.heard({"r2": told("there", counters={"there": 10.0})})
    shares.charge_prompt("here", 1)
    assert shares.must_wait("here") == (shares.counter("there") < shares.counter("here"))
