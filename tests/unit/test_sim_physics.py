"""Engines, caches and time of the simulator against closed forms and step-by-step sums."""

from collections.abc import Callable, Iterable
from random import Random
from statistics import fmean

import pytest

from tandem.domain import BlockHash
from tandem.held_blocks import BlockChange
from tandem.sim.block_cache import BlockCache
from tandem.sim.engine_profile import H200_LLAMA_8B_FP8, EngineProfile
from tandem.sim.physics import Engine, Job
from tandem.sim.store import Store
from tandem.sim.timeline import Timeline
from tandem.step_sample import StepSample

STEPWISE = EngineProfile(
    name="test",
    prefill_base_s=0.01,
    prefill_token_s=1e-4,
    prefill_pair_s=1e-7,
    decode_base_s=0.02,
    decode_request_s=0.003,
    decode_kv_token_s=1e-5,
    kv_room_tokens=1000,
    kv_bytes_per_token=1,
    max_num_batched_tokens=100,
    max_num_seqs=3,
)


class Bench:
    """One engine, and when each job had its first token and its last."""

    def __init__(self, profile: EngineProfile = STEPWISE, *, noise_sigma: float = 0.0, seed: int = 0) -> None:
        self.timeline = Timeline()
        self.engine = Engine(profile, self.timeline, Random(seed), noise_sigma=noise_sigma)
        self.first_s: dict[int, float] = {}
        self.end_s: dict[int, float] = {}

    def job(self, number: int, tokens: int, output: int = 1, *, cached: int = 0, priority: int = 0) -> Job:
        def first(job: Job) -> None:
            self.first_s[job.number] = self.timeline.now_s

        def end(job: Job) -> None:
            self.end_s[job.number] = self.timeline.now_s

        return Job(
            number=number,
            priority=priority,
            total_tokens=tokens,
            output_tokens=output,
            on_first_token=first,
            on_end=end,
            match_tokens=lambda job: cached,
        )

    def at(self, time_s: float, action: Callable[[Job], None], job: Job) -> None:
        self.timeline.at(time_s, action, job)


def waits_s(service_steps: Iterable[int], load: float, seed: int) -> tuple[float, float, float]:
    """Mean wait of Poisson arrivals with such services, mean service and mean squared service, in seconds. A step is one service unit."""
    steps = list(service_steps)
    profile = EngineProfile(
        name="unit",
        prefill_base_s=1.0,
        prefill_token_s=0.0,
        prefill_pair_s=0.0,
        decode_base_s=1.0,
        decode_request_s=0.0,
        decode_kv_token_s=0.0,
        kv_room_tokens=1,
        kv_bytes_per_token=1,
        max_num_batched_tokens=10,
    )
    bench, rng, now_s, came_s = Bench(profile), Random(seed), 0.0, dict[int, float]()
    rate = load * len(steps) / sum(steps)
    for number, count in enumerate(steps):
        now_s += rng.expovariate(rate)
        came_s[number] = now_s
        bench.at(now_s, bench.engine.prefill, bench.job(number, 10 * count))
    bench.timeline.run()
    waits = [bench.first_s[number] - came_s[number] - count for number, count in enumerate(steps)]
    return fmean(waits), fmean(steps), fmean(count * count for count in steps)


def test_equal_prompts_wait_as_in_an_m_d_1_queue() -> None:
    wait_s, service_s, _ = waits_s([1] * 20_000, 0.7, seed=1)
    assert wait_s == pytest.approx(0.7 * service_s / (2 * (1 - 0.7)), rel=0.08)


def test_unequal_prompts_wait_as_pollaczek_and_khinchine_say() -> None:
    draw = Random(5)
    wait_s, service_s, squared = waits_s((draw.choice((1, 1, 1, 2, 6)) for _ in range(20_000)), 0.6, seed=2)
    assert wait_s == pytest.approx(0.6 / service_s * squared / (2 * (1 - 0.6)), rel=0.1)


def test_a_prompt_alone_takes_its_chunks() -> None:
    bench = Bench()
    bench.at(1.0, bench.engine.prefill, bench.job(1, 250, cached=30))
    bench.timeline.run()
    pairs = 100 * (30 + 50) + 100 * (130 + 50) + 20 * (230 + 10)
    assert bench.first_s[1] == pytest.approx(1.0 + 3 * 0.01 + 220 * 1e-4 + pairs * 1e-7)
    assert bench.first_s[1] == pytest.approx(1.0 + STEPWISE.prefill_s(220, 30))
    assert bench.end_s == bench.first_s


def test_short_prompts_share_a_step_and_the_budget_bounds_it() -> None:
    bench = Bench()
    for number in range(3):
        bench.at(0.0, bench.engine.prefill, bench.job(number, 60))
    bench.timeline.run()
    alone_s = STEPWISE.step_s(60, 60 * 30, 0, 0)
    shared_s = STEPWISE.step_s(100, 60 * 30 + 40 * 20, 0, 0)
    assert bench.first_s[0] == pytest.approx(alone_s), "the first was alone when its step began"
    assert bench.first_s[1] == pytest.approx(alone_s + shared_s)
    assert bench.first_s[2] > bench.first_s[1]


def test_priority_goes_before_arrival() -> None:
    bench = Bench()
    for number, priority in ((0, 0), (1, 1), (2, 0)):
        bench.at(0.0, bench.engine.prefill, bench.job(number, 100, priority=priority))
    bench.timeline.run()
    assert bench.first_s[2] < bench.first_s[1]


def stepwise_ends_s(joins: dict[int, tuple[float, int, int]]) -> dict[int, float]:
    """When each request (joins at, tokens, output) ends, by adding up single steps."""
    waiting, running, ends_s, now_s = dict(joins), dict[int, list[int]](), {}, 0.0
    while waiting or running:
        for number, (join_s, tokens, output) in list(waiting.items()):
            if join_s <= now_s or (not running and join_s == min(one[0] for one in waiting.values())):
                now_s = max(now_s, join_s)
                running[number] = [tokens, output]
                del waiting[number]
        now_s += STEPWISE.step_s(0, 0.0, len(running), sum(tokens for tokens, _ in running.values()))
        for number, one in list(running.items()):
            one[0] += 1
            one[1] -= 1
            if not one[1]:
                ends_s[number] = now_s
                del running[number]
    return ends_s


@pytest.mark.parametrize("seed", range(5))
def test_decode_steps_in_one_go_end_when_single_steps_do(seed: int) -> None:
    rng = Random(seed)
    joins = {number: (rng.uniform(0.0, 2.0), rng.randint(1, 200), rng.randint(1, 60)) for number in range(3)}
    bench = Bench()
    for number, (join_s, tokens, output) in joins.items():
        bench.at(join_s, bench.engine.decode, bench.job(number, tokens, output))
    bench.timeline.run()
    assert bench.end_s == pytest.approx(stepwise_ends_s(joins))
    assert bench.engine.kv_tokens == 0


def test_prompts_slow_the_decodes_in_their_steps() -> None:
    bench = Bench()
    bench.at(0.0, bench.engine.decode, bench.job(1, 10, 10))
    bench.at(0.001, bench.engine.prefill, bench.job(2, 150, 3))
    bench.timeline.run()
    alone_s = STEPWISE.decode_s(1, 1, 10)
    mixed_s = STEPWISE.step_s(99, 99 * 49.5, 1, 11) + STEPWISE.step_s(51, 51 * (99 + 25.5), 1, 12)
    assert bench.first_s[2] == pytest.approx(alone_s + mixed_s)
    together_s = STEPWISE.decode_s(2, 2, 13 + 151)
    assert bench.end_s[2] == pytest.approx(bench.first_s[2] + together_s)
    assert bench.end_s[1] == pytest.approx(bench.end_s[2] + STEPWISE.decode_s(5, 1, 15))


def test_requests_wait_for_sequences_and_kv_room_but_one_alone_always_runs() -> None:
    bench = Bench()
    bench.at(0.0, bench.engine.decode, bench.job(0, 5000, 2))
    for number in range(1, 6):
        bench.at(0.0, bench.engine.decode, bench.job(number, 400, 2))
    bench.timeline.run()
    ends = sorted(set(bench.end_s.values()))
    assert [sum(end_s == one for end_s in bench.end_s.values()) for one in ends] == [1, 2, 2, 1]


def test_slowness_begins_with_the_next_step() -> None:
    bench = Bench()
    bench.at(0.0, bench.engine.decode, bench.job(1, 10, 4))
    bench.timeline.at(0.03, bench.engine.set_slow_factor, 2.0)
    bench.timeline.run()
    assert bench.end_s[1] == pytest.approx(STEPWISE.decode_s(2, 1, 10) + 2.0 * STEPWISE.decode_s(2, 1, 12))


def test_a_slowness_set_in_an_idle_engine_is_there_at_its_next_step() -> None:
    bench = Bench()
    bench.engine.set_slow_factor(3.0)
    bench.at(0.0, bench.engine.decode, bench.job(1, 10, 1))
    bench.timeline.run()
    assert bench.end_s[1] == pytest.approx(3.0 * STEPWISE.decode_s(1, 1, 10))


def test_a_cancelled_request_leaves_at_the_end_of_its_step_and_gives_back_its_kv() -> None:
    bench = Bench()
    job, other = bench.job(1, 10, 100), bench.job(2, 10, 6)
    bench.at(0.0, bench.engine.decode, job)
    bench.at(0.0, bench.engine.decode, other)
    made: list[int] = []

    def cancel() -> None:
        made.append(bench.engine.made_tokens(job))
        bench.engine.cancel(job)
        bench.engine.cancel(job)
        made.append(bench.engine.made_tokens(job))

    bench.timeline.at(0.06, cancel)
    bench.timeline.run()
    assert made == [2, 0]
    assert list(bench.end_s) == [2]
    assert bench.engine.kv_tokens == 0


def test_whoever_is_cancelled_before_its_turn_is_passed_over() -> None:
    bench = Bench()
    gone = [bench.job(1, 10, 5), bench.job(2, 10, 5), bench.job(3, 10)]
    bench.at(0.0, bench.engine.prefill, bench.job(0, 100))
    bench.at(0.0, bench.engine.prefill, gone[0])
    bench.at(0.0, bench.engine.decode, gone[1])
    for job in gone:
        bench.at(0.001, bench.engine.cancel, job)
    bench.timeline.run()
    assert list(bench.end_s) == [0]
    assert bench.engine.made_tokens(gone[0]) == 0


def test_a_prompt_that_is_cancelled_in_its_last_step_has_no_token() -> None:
    bench = Bench()
    job = bench.job(1, 50, 5)
    bench.at(0.0, bench.engine.decode, running := bench.job(2, 10, 50))
    bench.at(0.001, bench.engine.prefill, job)
    bench.timeline.at(0.03, bench.engine.cancel, job)
    bench.timeline.at(0.03, bench.engine.cancel, running)
    bench.timeline.run()
    assert bench.first_s == bench.end_s == {}
    assert bench.engine.kv_tokens == 0


def test_a_request_that_is_cancelled_in_its_last_step_leaves_with_it() -> None:
    bench = Bench()
    job = bench.job(1, 10, 1)
    bench.at(0.0, bench.engine.decode, job)
    bench.at(0.001, bench.engine.cancel, job)
    bench.timeline.run()
    assert bench.end_s == {}


def test_noise_has_mean_one_and_comes_from_the_seed() -> None:
    def ends_s(seed: int) -> list[float]:
        bench = Bench(noise_sigma=0.3, seed=seed)
        for number in range(2000):
            bench.at(1.0 * number, bench.engine.prefill, bench.job(number, 100))
        bench.timeline.run()
        return [bench.first_s[number] - number for number in range(2000)]

    assert ends_s(1) == ends_s(1) != ends_s(2)
    assert fmean(ends_s(1)) == pytest.approx(STEPWISE.prefill_s(100), rel=0.03)


def test_steps_are_told_with_what_they_computed() -> None:
    bench, samples = Bench(), list[StepSample]()
    bench.engine.on_step = samples.append
    bench.at(0.0, bench.engine.prefill, bench.job(1, 40, 4))
    bench.timeline.run()
    assert samples[0] == StepSample(prefill_tokens=40, prefill_pairs=800, decode_requests=0, kv_tokens=0, duration_s=bench.first_s[1])
    assert (samples[1].decode_requests, samples[1].kv_tokens) == (1, 42)
    assert samples[1].duration_s == pytest.approx(STEPWISE.step_s(0, 0, 1, 42))
    assert bench.engine.busy_s == pytest.approx(bench.end_s[1])


def test_the_profile_says_what_was_measured() -> None:
    measured_s = {100: 19.5e-3, 8_236: 171e-3, 16_372: 375e-3}
    for tokens, seconds in measured_s.items():
        one_step_s = H200_LLAMA_8B_FP8.prefill_base_s + H200_LLAMA_8B_FP8.compute_s(tokens, 0)
        assert one_step_s == pytest.approx(seconds, rel=0.1)
    assert H200_LLAMA_8B_FP8.decode_s(1, 1, 100) == pytest.approx(4.4e-3, rel=0.1)


def test_who_is_told_of_a_first_token_or_an_end_may_send_more_at_once() -> None:
    bench = Bench()
    bench.at(0.0, bench.engine.prefill, first := bench.job(1, 40))
    bench.at(0.0, bench.engine.decode, last := bench.job(2, 40, 1))
    first.on_first_token = lambda job: bench.engine.prefill(bench.job(3, 40))
    last.on_end = lambda job: bench.engine.prefill(bench.job(4, 40))
    bench.timeline.run()
    assert set(bench.end_s) == {1, 3, 4}
    bench.timeline.at(9.0, bench.engine.decode, alone := bench.job(5, 40, 2))
    alone.on_end = lambda job: bench.engine.prefill(bench.job(6, 40))
    bench.timeline.run()
    assert set(bench.end_s) == {1, 3, 4, 6}


def test_who_comes_in_the_last_step_of_many_cuts_nothing() -> None:
    bench = Bench()
    bench.at(0.0, bench.engine.decode, bench.job(1, 10, 3))
    bench.at(STEPWISE.decode_s(3, 1, 10) - 0.001, bench.engine.decode, bench.job(2, 10, 1))
    bench.timeline.run()
    assert bench.end_s[1] == pytest.approx(STEPWISE.decode_s(3, 1, 10))
    assert bench.end_s[2] == pytest.approx(bench.end_s[1] + STEPWISE.decode_s(1, 1, 10))


def test_things_happen_in_order_of_time_and_then_of_planning() -> None:
    timeline, seen = Timeline(), list[tuple[str, float]]()

    def note(name: str) -> None:
        seen.append((name, timeline.now_s))
        if name == "a":
            timeline.at(0.5, note, "late")

    for name, time_s in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
        timeline.at(time_s, note, name)
    assert timeline.run() == 4
    assert seen == [("a", 1.0), ("late", 1.0), ("b", 2.0), ("c", 2.0)]


def hashes(text: str) -> list[BlockHash]:
    return [BlockHash(letter.encode()) for letter in text]


def test_a_cache_matches_leading_blocks_and_forgets_the_end_of_old_chains_first() -> None:
    cache = BlockCache(4)
    cache.put(hashes("abc"))
    assert [cache.match(hashes(text)) for text in ("abc", "abx", "xbc")] == [3, 2, 0]
    cache.put(hashes("xy"))
    assert cache.match(hashes("abc")) == 2
    assert cache.match(hashes("xy")) == 2
    assert len(cache) == 4


def told(text: str) -> bytes:
    """The short hashes of blocks named by letters, in their order."""
    return b"".join(letter.encode().ljust(32, b"-")[:8] for letter in text)


def long_hashes(text: str) -> list[BlockHash]:
    return [BlockHash(letter.encode().ljust(32, b"-")) for letter in text]


def test_a_cache_tells_once_what_came_and_what_went() -> None:
    cache = BlockCache(3)
    assert not cache.has_changed
    assert not cache.take_change()
    cache.put(long_hashes("ab"))
    assert cache.has_changed
    assert cache.take_change() == BlockChange(stored=told("ba"))
    cache.put(long_hashes("ab"))
    assert not cache.has_changed
    cache.put(long_hashes("cd"))
    assert cache.take_change() == BlockChange(removed=told("b"), stored=told("dc"))


def test_the_store_tells_its_changes_on_a_grid_and_late() -> None:
    timeline, heard = Timeline(), list[tuple[float, BlockChange]]()
    store = Store(8, timeline, delay_s=0.5, tell=lambda change: heard.append((timeline.now_s, change)))
    for time_s, text in ((0.05, "a"), (0.1, "ab"), (0.3, "ab"), (0.9, "c")):
        timeline.at(time_s, store.put, long_hashes(text))
    timeline.run()
    assert [change for _, change in heard] == [BlockChange(stored=told("ab")), BlockChange(stored=told("c"))]
    assert [time_s for time_s, _ in heard] == pytest.approx([0.7, 1.5])
    assert store.match(long_hashes("abx")) == 2
