"""The plans of a chaos run: the same for the same seed, and nothing left out."""

from collections import Counter
from itertools import islice

from tandem.chaos.cases import OUTPUT_TOKENS, PROMPT_TOKENS, Transport, endless_sends, plan_cases
from tandem.chaos.schedule import ALL_PAIRS, HOLD_S, Action, Row, plan_faults


def test_every_row_is_broken_in_every_way_twice() -> None:
    counts = Counter(fault.pair for fault in plan_faults(7))
    assert counts == Counter(dict.fromkeys(ALL_PAIRS, 2))


def test_every_row_of_the_table_has_an_action() -> None:
    assert {row for row, _ in ALL_PAIRS} == set(Row)
    assert {action for _, action in ALL_PAIRS} == set(Action)


def test_the_first_round_has_every_pair_once() -> None:
    assert {fault.pair for fault in plan_faults(3)[: len(ALL_PAIRS)]} == set(ALL_PAIRS)


def test_the_same_seed_plans_the_same_faults_and_another_one_others() -> None:
    assert plan_faults(5) == plan_faults(5)
    assert plan_faults(5) != plan_faults(6)


def test_what_is_held_has_its_time_and_a_kill_has_none() -> None:
    assert all(fault.hold_s == HOLD_S.get(fault.action, 0.0) for fault in plan_faults(1))


def test_a_fault_chooses_the_same_one_in_whatever_order_they_come() -> None:
    fault = plan_faults(2)[0]
    assert fault.choose(["b", "a", "c"]) == fault.choose(["c", "b", "a"])
    assert fault.choose([]) is None


def test_cases_have_lengths_within_bounds_and_both_ends() -> None:
    cases = plan_cases(300, 0)
    lengths = [case.prompt_tokens for case in cases]
    assert (min(lengths), max(lengths)) == PROMPT_TOKENS
    assert all(OUTPUT_TOKENS[0] <= case.max_tokens <= OUTPUT_TOKENS[1] for case in cases)
    assert any(case.stop for case in cases)
    assert any(case.logprobs for case in cases)
    assert not any(case.stop and case.logprobs for case in cases)


def test_sends_go_through_all_cases_and_begin_again() -> None:
    cases = plan_cases(40, 0)
    sends = list(islice(endless_sends(cases, 0, 2.0), 80))
    assert Counter(send.case for send in sends) == Counter({case.number: 2 for case in cases})
    assert [send.index for send in sends] == list(range(80))


def test_sends_are_a_function_of_the_seed_and_use_every_transport() -> None:
    cases = plan_cases(200, 0)
    sends = list(islice(endless_sends(cases, 4, 2.0), 200))
    assert sends == list(islice(endless_sends(cases, 4, 2.0), 200))
    assert {send.transport for send in sends} == set(Transport)
    assert any(send.cancel_after_tokens for send in sends)
    assert sum(send.gap_s for send in sends) / len(sends) < 1.0
