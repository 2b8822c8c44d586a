"""Workloads: arrivals, lengths, prompts and recorded traces."""

import math

import numpy as np
import pytest

from tandem.errors import ConfigError
from tandem.workload import (
    FIRST_PROMPT_TOKEN_ID,
    Lengths,
    PlannedRequest,
    Prompts,
    TraceRow,
    clip_to_context,
    draw_requests,
    parse_trace,
    poisson_times_s,
    requests_of_trace,
    trace_block_tokens,
)

PROMPTS = Prompts(seed=1, vocabulary_tokens=2048, block_tokens=32)


def request(index: int = 0, prompt_tokens: int = 100, output_tokens: int = 10, block_ids: tuple[int, ...] = ()) -> PlannedRequest:
    return PlannedRequest(index=index, send_at_s=0.0, prompt_tokens=prompt_tokens, output_tokens=output_tokens, block_ids=block_ids)


def row(time_s: float, prompt_tokens: int = 100, output_tokens: int = 10) -> TraceRow:
    return TraceRow(time_s=time_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, block_ids=(0, 1))


def test_a_number_is_one_length_and_a_range_has_both_ends() -> None:
    assert Lengths.parse("--x", "128").draw(3, np.random.default_rng(0)) == [128, 128, 128]
    drawn = Lengths.parse("--x", "2:4").draw(200, np.random.default_rng(0))
    assert set(drawn) == {2, 3, 4}


@pytest.mark.parametrize("text", ["", "a", "1.5", "1:b", ":", "0", "-1", "5:4", "1:2:3"])
def test_a_length_that_is_none_is_an_error_with_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--prompt-tokens must be"):
        Lengths.parse("--prompt-tokens", text)


def test_arrivals_have_exactly_the_rate_and_exponential_gaps() -> None:
    times_s = poisson_times_s(20_000, 50.0, np.random.default_rng(3))
    assert times_s[-1] == pytest.approx(400.0)
    gaps_s = np.diff([0.0, *times_s])
    assert gaps_s.min() >= 0.0
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, abs=0.03)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert poisson_times_s(3, math.inf, np.random.default_rng(0)) == [0.0, 0.0, 0.0]


def test_a_seed_gives_the_same_workload_and_the_rate_changes_only_times() -> None:
    def draw(seed: int, rate_rps: float) -> list[PlannedRequest]:
        lengths = Lengths(low_tokens=10, high_tokens=500)
        return draw_requests(50, rate_rps, lengths, lengths, seed=seed, is_prefix_shared=False)

    assert draw(7, 2.0) == draw(7, 2.0)
    assert draw(7, 2.0) != draw(8, 2.0)
    slow, fast = draw(7, 2.0), draw(7, 4.0)
    assert [(item.prompt_tokens, item.output_tokens) for item in slow] == [(item.prompt_tokens, item.output_tokens) for item in fast]
    assert [item.send_at_s for item in slow] == pytest.approx([2 * item.send_at_s for item in fast])


def test_a_shared_prefix_is_the_same_in_all_prompts_and_the_rest_is_not() -> None:
    lengths = Lengths(low_tokens=100, high_tokens=100)
    first, second = draw_requests(2, 1.0, lengths, lengths, seed=1, is_prefix_shared=True)
    one, other = PROMPTS.token_ids(first), PROMPTS.token_ids(second)
    assert len(one) == len(other) == 100
    assert one[:32] == other[:32]
    assert one[32:48] != other[32:48]


def test_prompts_repeat_for_a_request_and_differ_between_requests_and_seeds() -> None:
    assert PROMPTS.token_ids(request()) == PROMPTS.token_ids(request())
    assert PROMPTS.token_ids(request()) != PROMPTS.token_ids(request(index=1))
    assert PROMPTS.token_ids(request()) != Prompts(seed=2, vocabulary_tokens=2048, block_tokens=32).token_ids(request())


def test_prompt_ids_lie_in_the_vocabulary() -> None:
    token_ids = Prompts(seed=1, vocabulary_tokens=10, block_tokens=4).token_ids(request(prompt_tokens=500, block_ids=(0, 1)))
    assert set(token_ids) == set(range(FIRST_PROMPT_TOKEN_ID, 10))
    assert all(type(token_id) is int for token_id in token_ids)


def test_blocks_of_one_id_are_equal_and_the_last_one_is_cut_to_the_prompt() -> None:
    one = PROMPTS.token_ids(request(prompt_tokens=70, block_ids=(4, 5, 6)))
    other = PROMPTS.token_ids(request(index=9, prompt_tokens=100, block_ids=(4, 5, 7)))
    assert len(one) == 70
    assert one[:64] == other[:64]
    assert one[64:] != other[64:70]


def test_a_trace_is_read_and_its_groups_are_spread_over_the_time_to_the_next() -> None:
    lines = [
        '{"timestamp": 1000, "input_length": 10, "output_length": 1, "hash_ids": [7]}\n',
        "\n",
        '{"timestamp": 1000, "input_length": 20, "output_length": 2, "hash_ids": [8]}\n',
        '{"timestamp": 4000, "input_length": 40, "output_length": 4}\n',
        '{"timestamp": 4000, "input_length": 50, "output_length": 5}\n',
        '{"timestamp": 3000, "input_length": 30, "output_length": 3}\n',
    ]
    rows = parse_trace(lines, "t")
    assert [item.time_s for item in rows] == pytest.approx([0.0, 1.0, 2.0, 3.0, 3.5])
    assert [item.prompt_tokens for item in rows] == [10, 20, 30, 40, 50]
    assert [item.block_ids for item in rows[:3]] == [(7,), (8,), ()]


def test_a_trace_of_one_moment_is_sent_at_once() -> None:
    line = '{"timestamp": 5, "input_length": 10, "output_length": 1}'
    assert [item.time_s for item in parse_trace([line, line], "t")] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "t:2: no request"),
        ("[1]", "t:2: no request"),
        ('{"timestamp": 1, "input_length": 1}', "t:2: the field 'output_length' is missing"),
        ('{"timestamp": 1, "input_length": "x", "output_length": 1}', "t:2: no request"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "t:2: times must be finite"),
        ('{"timestamp": 1, "input_length": -1, "output_length": 1}', "t:2: input_length must not be negative, got -1"),
        ('{"timestamp": 1, "input_length": 1, "output_length": -7}', "t:2: output_length must not be negative, got -7"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [-2]}', "t:2: hash_ids must not be negative"),
        ('{"timestamp": 1, "input_length": 1.5, "output_length": 1}', "input_length must be a whole number, got 1.5"),
        ('{"timestamp": 1, "input_length": Infinity, "output_length": 1}', "input_length must be a whole number"),
        ('{"timestamp": true, "input_length": 1, "output_length": 1}', "timestamp must be a number, got 'True'"),
        (f'{{"timestamp": 1{"0" * 400}, "input_length": 1, "output_length": 1}}', "timestamp is too large"),
        (f'{{"timestamp": 1, "input_length": 1{"0" * 20}, "output_length": 1}}', "t:2: input_length must be at most 10000000, got 10000"),
        (f'{{"timestamp": 1, "input_length": 1, "output_length": 1{"0" * 400}}}', "t:2: output_length must be at most 10000000, got 10000"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ' + "[" * 100_000, "t:2: the line nests too deep"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 3}', "t:2: no request"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_trace(['{"timestamp": 0, "input_length": 1, "output_length": 1}', line], "t")


def test_a_trace_that_must_be_ordered_names_the_line_where_time_goes_backwards() -> None:
    lines = [f'{{"timestamp": {time_ms}, "input_length": 1, "output_length": 1}}' for time_ms in (0, 3000, 3000, 2000)]
    with pytest.raises(ConfigError, match="t:4: timestamp goes backwards, 2000 after 3000"):
        parse_trace(lines, "t", must_be_ordered=True)


def test_an_empty_trace_is_an_error() -> None:
    with pytest.raises(ConfigError, match="holds no requests"):
        parse_trace(["\n"], "t")


def test_a_trace_keeps_its_times_and_can_be_cut_by_count_and_time() -> None:
    rows = [row(0.0), row(1.0), row(2.0), row(3.0)]
    assert [item.send_at_s for item in requests_of_trace(rows)] == [0.0, 1.0, 2.0, 3.0]
    assert len(requests_of_trace(rows, max_requests=3)) == 3
    assert len(requests_of_trace(rows, max_s=2.0)) == 2


def test_a_rate_stretches_a_traces_time() -> None:
    rows = [row(0.0), row(1.0), row(2.0), row(3.0)]
    assert [item.send_at_s for item in requests_of_trace(rows, rate_rps=2.0)] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert [item.send_at_s for item in requests_of_trace(rows, rate_rps=math.inf)] == [0.0] * 4
    assert [item.send_at_s for item in requests_of_trace(rows[:1], rate_rps=2.0)] == [0.0]
    assert [item.send_at_s for item in requests_of_trace([row(0.0), row(0.0)], rate_rps=2.0)] == [0.0, 0.0]


def test_a_scale_shrinks_lengths_and_what_a_block_stands_for() -> None:
    scaled = requests_of_trace([row(0.0, 1600, 3)], scale=1 / 16)
    assert (scaled[0].prompt_tokens, scaled[0].output_tokens, scaled[0].block_ids) == (100, 1, (0, 1))
    assert (trace_block_tokens(1 / 16), trace_block_tokens(1.0), trace_block_tokens(1e-9)) == (32, 512, 1)


def test_requests_are_cut_to_the_context_prompts_first() -> None:
    fits, long, endless = request(prompt_tokens=90), request(prompt_tokens=95), request(output_tokens=1000)
    clipped, count = clip_to_context([fits, long, endless], 100)
    assert count == 2
    assert [(item.prompt_tokens, item.output_tokens) for item in clipped] == [(90, 10), (90, 10), (1, 99)]
