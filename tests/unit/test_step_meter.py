"""What a step computed and whose time it was, from what the engine's scheduler says."""

from dataclasses import dataclass, field

from tandem.engine.step_meter import StepMeter, take_step, with_step
from tandem.step_sample import StepSample


@dataclass(frozen=True)
class New:
    req_id: str
    num_computed_tokens: int = 0


@dataclass(frozen=True)
class Known:
    req_ids: tuple[str, ...] = ()
    num_computed_tokens: tuple[int, ...] = ()
    num_output_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    scheduled_new_reqs: tuple[New, ...] = ()
    scheduled_cached_reqs: Known = field(default_factory=Known)
    has_sync_kv_loads: bool = False

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


def measured(step: Step) -> StepSample | None:
    """Of a step of two seconds."""
    meter = StepMeter()
    meter.scheduled(step, 1.0)
    return meter.ended(step, 3.0)


def test_a_prompt_counts_its_tokens_and_what_they_attend_to() -> None:
    step = Step({"a": 100, "b": 10}, (New("a", 50),), Known(("b",), (30,), (0,)))
    assert measured(step) == StepSample(
        prefill_tokens=110, prefill_pairs=100 * 50 + 5000 + 10 * 30 + 50, decode_requests=0, kv_tokens=0, duration_s=2.0
    )


def test_decode_requests_attend_to_what_is_there_and_their_own_token() -> None:
    step = Step({"a": 1, "b": 1}, (), Known(("a", "b"), (10, 20), (1, 5)))
    assert measured(step) == StepSample(prefill_tokens=0, prefill_pairs=0, decode_requests=2, kv_tokens=32, duration_s=2.0)


def test_both_kinds_count_in_one_step() -> None:
    step = Step({"a": 1, "b": 8}, (New("b", 0),), Known(("a",), (10,), (1,)))
    assert measured(step) == StepSample(prefill_tokens=8, prefill_pairs=32, decode_requests=1, kv_tokens=11, duration_s=2.0)


def test_the_last_token_of_a_prompt_is_no_decode_request() -> None:
    step = Step({"a": 1, "b": 1}, (), Known(("a", "b"), (10, 20), (0, 5)))
    assert measured(step) == StepSample(prefill_tokens=1, prefill_pairs=10, decode_requests=1, kv_tokens=21, duration_s=2.0)


def test_a_preempted_request_computes_its_tokens_again_as_a_prompt() -> None:
    step = Step({"a": 40}, (), Known(("a",), (0,), (9,)))
    assert measured(step) == StepSample(prefill_tokens=40, prefill_pairs=800, decode_requests=0, kv_tokens=0, duration_s=2.0)


def test_a_step_that_computes_nothing_or_waits_for_the_store_is_no_sample() -> None:
    assert measured(Step()) is None
    assert measured(Step({"a": 8}, (New("a"),), has_sync_kv_loads=True)) is None


def test_a_step_that_was_scheduled_ahead_begins_when_the_one_before_it_ends() -> None:
    meter = StepMeter()
    first, second = Step({"a": 8}, (New("a"),)), Step({"b": 8}, (New("b"),))
    meter.scheduled(first, 1.0)
    meter.scheduled(second, 1.5)
    samples = meter.ended(first, 3.0), meter.ended(second, 4.0)
    assert [sample and sample.duration_s for sample in samples] == [2.0, 1.0]


def test_the_wait_before_a_step_is_not_its_time() -> None:
    meter = StepMeter()
    first, second = Step({"a": 8}, (New("a"),)), Step({"b": 8}, (New("b"),))
    meter.scheduled(first, 1.0)
    meter.ended(first, 2.0)
    meter.scheduled(second, 100.0)
    sample = meter.ended(second, 100.5)
    assert sample is not None
    assert sample.duration_s == 0.5


def test_a_step_whose_begin_is_not_known_is_no_sample() -> None:
    meter = StepMeter()
    step = Step({"a": 8}, (New("a"),))
    meter.scheduled(Step(), 1.0)
    assert meter.ended(step, 2.0) is None


def test_a_sample_travels_beside_the_stats_of_others_and_leaves_them_as_they_were() -> None:
    sample = StepSample(prefill_tokens=1, prefill_pairs=2, decode_requests=3, kv_tokens=4, duration_s=0.5)
    assert take_step(with_step(None, sample)) == (sample, None)
    assert take_step(with_step({"other": 1}, sample)) == (sample, {"other": 1})
    assert take_step(None) == (None, None)
    assert take_step({"other": 1}) == (None, {"other": 1})
