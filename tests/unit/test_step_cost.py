"""Closed forms of engine work agree with adding up the steps one by one."""

import pytest

from tandem.step_cost import StepCost, attention_pairs

COST = StepCost(base_s=0.01, token_s=1e-5, pair_s=1e-9, request_s=1e-4, kv_token_s=1e-8)


def test_a_prompt_costs_the_sum_of_its_chunks() -> None:
    tokens, cached, chunk = 5000, 700, 2048
    summed_s, done = 0.0, 0
    while done < tokens:
        step = min(chunk, tokens - done)
        summed_s += COST.step_s(step, step * (cached + done) + step * step / 2, 0, 0)
        done += step
    assert COST.finish_s(tokens, attention_pairs(tokens, cached), chunk) == pytest.approx(summed_s)


def test_nothing_to_do_takes_no_time() -> None:
    assert COST.finish_s(0, 0, 2048) == 0.0


def test_decode_requests_take_their_part_of_each_step() -> None:
    alone_s = COST.finish_s(2000, 0, 2000)
    beside_s = COST.finish_s(2000, 0, 2000, requests=100, kv_tokens=10_000, elapsed_s=1.0)
    assert beside_s == pytest.approx(alone_s + COST.base_s + 2 * (100 * 1e-4 + 10_000 * 1e-8))


def test_a_new_prompt_waits_for_the_rest_of_the_step_that_runs() -> None:
    step_s = COST.decode_s(8, 1000)
    assert COST.finish_s(0, 0, 2048, requests=8, kv_tokens=1000, elapsed_s=0.0) == pytest.approx(step_s)
    assert COST.finish_s(0, 0, 2048, requests=8, kv_tokens=1000) == pytest.approx(step_s / 2)
    assert COST.finish_s(0, 0, 2048, requests=8, kv_tokens=1000, elapsed_s=5.0) == 0.0


def test_pending_prompts_come_first() -> None:
    ahead_s = COST.finish_s(0, 0, 1000, pending_tokens=3000, elapsed_s=0.0)
    assert ahead_s == pytest.approx(3 * (COST.base_s + 1000 * COST.token_s))
    both_s = COST.finish_s(500, 0, 1000, pending_tokens=3000, elapsed_s=0.0)
    assert both_s == pytest.approx(ahead_s + COST.base_s + 500 * COST.token_s)


def test_own_tokens_fill_up_the_last_pending_chunk() -> None:
    assert COST.finish_s(400, 0, 1000, pending_tokens=1600, elapsed_s=0.0) == pytest.approx(2 * COST.base_s + 2000 * COST.token_s)


def test_prompts_between_decode_steps_make_them_longer() -> None:
    alone_s = COST.tpot_s(8, 4000)
    assert alone_s == COST.decode_s(8, 4000)
    with_prompt_s = COST.tpot_s(8, 4000, output_tokens=10, pending_tokens=1000, pending_pairs=0, chunk_tokens=1000)
    assert with_prompt_s == pytest.approx(alone_s + 1000 * COST.token_s / 10)


def test_no_more_prompt_is_computed_than_there_are_steps_for() -> None:
    few = COST.tpot_s(0, 0, output_tokens=2, pending_tokens=100_000, chunk_tokens=1000)
    assert few == pytest.approx(COST.base_s + 1000 * COST.token_s)


def test_a_slower_replica_is_slower_in_all() -> None:
    assert COST.scaled(2.0).step_s(10, 50, 3, 700) == pytest.approx(2 * COST.step_s(10, 50, 3, 700))


def test_pairs_are_those_of_the_sample() -> None:
    assert attention_pairs(10, 100) == 10 * 100 + 10 * 10 / 2
