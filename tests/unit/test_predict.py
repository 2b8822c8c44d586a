"""The parts of a request's time add up, fixed costs are learnt, and every interval is calibrated by outcomes."""

from random import Random

import pytest

from router.interval import Interval, PredictionKind
from router.output_length import OutputEstimate
from router.pool_times import PoolKey
from router.predict import EngineWork, LoadPredictor, PredictConfig
from tandem.errors import ConfigError
from tandem.step_cost import attention_pairs
from tests.step_profiles import any_batch, h200_s, prompts, sample

MODEL = "m"
PREFILL, DECODE = PoolKey(MODEL, "h200", "prefill"), PoolKey(MODEL, "h200", "decode")
IDLE = EngineWork(chunk_tokens=8192)


def _learnt(*, slowdown: float = 1.0) -> LoadPredictor:
    """Knows the H200 profile; replica "slow" is as slow as asked for."""
    predictor, rng = LoadPredictor(), Random(1)
    for index in range(200):
        for pool, load in ((PREFILL, prompts), (DECODE, any_batch)):
            for replica_id, factor in (("r0", 1.0), ("r1", 1.0), ("slow", slowdown)):
                predictor.pools.observe(pool, replica_id, [sample(h200_s, load, rng, slowdown=factor)], index / 10)
    return predictor


def test_a_prompt_alone_takes_what_the_profile_says() -> None:
    predictor = _learnt()
    seconds = predictor.prefill_s(PREFILL, "r0", IDLE, uncached_tokens=8000, cached_tokens=0)
    assert seconds == pytest.approx(h200_s(8000, attention_pairs(8000, 0), 0, 0), rel=0.03)


def test_what_is_cached_is_not_computed() -> None:
    predictor = _learnt()
    whole_s = predictor.prefill_s(PREFILL, "r0", IDLE, uncached_tokens=8000, cached_tokens=0)
    half_s = predictor.prefill_s(PREFILL, "r0", IDLE, uncached_tokens=4000, cached_tokens=4000)
    assert 0.5 < half_s / whole_s < 0.75


def test_work_ahead_is_waited_for() -> None:
    predictor = _learnt()
    busy = EngineWork(chunk_tokens=8192, pending_tokens=8000, pending_pairs=attention_pairs(8000, 0), step_elapsed_s=0.0)
    alone_s = predictor.prefill_s(PREFILL, "r0", IDLE, uncached_tokens=1000, cached_tokens=0)
    behind_s = predictor.prefill_s(PREFILL, "r0", busy, uncached_tokens=1000, cached_tokens=0)
    assert predictor.backlog_s(PREFILL, "r0", IDLE) == 0.0
    assert behind_s == pytest.approx(alone_s + predictor.backlog_s(PREFILL, "r0", busy))


def test_a_slow_replica_takes_longer_in_all() -> None:
    predictor = _learnt(slowdown=1.6)
    slow_s, fast_s = (predictor.prefill_s(PREFILL, name, IDLE, uncached_tokens=4000, cached_tokens=0) for name in ("slow", "r0"))
    assert slow_s / fast_s == pytest.approx(1.6, rel=0.1)


def test_a_prompt_between_them_slows_the_batch() -> None:
    predictor = _learnt()
    batch = EngineWork(chunk_tokens=8192, decode_requests=64, kv_tokens=64_000)
    alone_s = predictor.tpot_s(DECODE, "r0", batch, output_tokens=100)
    assert alone_s == pytest.approx(h200_s(0, 0, 64, 64_000), rel=0.03)
    with_prompt_s = predictor.tpot_s(DECODE, "r0", batch._replace(pending_tokens=8000), output_tokens=100)
    assert with_prompt_s == pytest.approx(alone_s + 8000 * 15.183e-6 / 100, rel=0.05)


def test_a_workers_fixed_cost_is_learnt_from_prompts_that_hardly_waited() -> None:
    predictor = LoadPredictor()
    busy = EngineWork(chunk_tokens=8192, pending_tokens=80_000)
    before_s = predictor.prefill_s(PREFILL, "r0", IDLE, uncached_tokens=500, cached_tokens=0)
    for _ in range(100):
        waited = predictor.prefill(PREFILL, "r0", busy, uncached_tokens=500, cached_tokens=0)
        predictor.observe(PredictionKind.PREFILL, MODEL, waited, 2 * waited.mean_s, 0.0)
    assert predictor.prefill_s(PREFILL, "r0", IDLE, uncached_tokens=500, cached_tokens=0) == before_s
    for _ in range(100):
        alone = predictor.prefill(PREFILL, "r0", IDLE, uncached_tokens=500, cached_tokens=0)
        predictor.observe(PredictionKind.PREFILL, MODEL, alone, before_s + 0.02, 0.0)
    assert predictor.prefill_s(PREFILL, "r0", IDLE, uncached_tokens=500, cached_tokens=0) == pytest.approx(before_s + 0.02)


def test_the_cost_between_two_steps_is_learnt() -> None:
    predictor = _learnt()
    batch = EngineWork(chunk_tokens=8192, decode_requests=8, kv_tokens=8000)
    step_s = predictor.tpot_s(DECODE, "r0", batch, output_tokens=100)
    for _ in range(20):
        predicted = predictor.tpot(DECODE, "r0", batch, output_tokens=100)
        predictor.observe(PredictionKind.TPOT, MODEL, predicted, step_s + 0.001, 0.0)
    assert predictor.tpot_s(DECODE, "r0", batch, output_tokens=100) == pytest.approx(step_s + 0.001)


def test_a_fixed_cost_is_never_below_zero() -> None:
    predictor = _learnt()
    step_s = predictor.tpot_s(DECODE, "r0", EngineWork(chunk_tokens=8192, decode_requests=8), output_tokens=100)
    for _ in range(20):
        predictor.observe(PredictionKind.TPOT, MODEL, Interval(step_s, step_s, step_s), 0.0, 0.0)
    assert predictor.tpot_s(DECODE, "r0", EngineWork(chunk_tokens=8192, decode_requests=8), output_tokens=100) == step_s


def test_ttft_is_queue_dispatch_and_prefill() -> None:
    predictor = LoadPredictor()
    for _ in range(10):
        predictor.observe_dispatch(MODEL, 0.003)
    ttft = predictor.ttft(MODEL, queue=Interval(0.5, 0.9), prefill=Interval(0.2, 0.3))
    assert ttft.mean_s == pytest.approx(0.703)
    assert ttft.q90_s > ttft.mean_s


def test_e2e_adds_the_gap_and_every_further_token() -> None:
    predictor = LoadPredictor()
    ttft, tpot, output = Interval(1.0, 1.0), Interval(0.01, 0.01), OutputEstimate(101.0, 90.0, 200.0)
    assert predictor.e2e(MODEL, ttft=ttft, tpot=tpot, output=output).mean_s == pytest.approx(2.0)
    handed_off = predictor.e2e(MODEL, ttft=ttft, tpot=tpot, output=output, handoff_gap=Interval(0.1, 0.1))
    assert handed_off.mean_s == pytest.approx(1.0 + 0.1 + 0.99)


@pytest.mark.parametrize("is_same_node", [True, False])
def test_gaps_and_transfers_are_learnt_by_where_the_ends_are(is_same_node: bool) -> None:
    predictor, rng = LoadPredictor(), Random(2)
    elsewhere = predictor.handoff_gap_s(MODEL, blocks=100, is_same_node=not is_same_node)
    for _ in range(200):
        blocks = rng.randint(1, 500)
        predictor.observe_handoff_gap(MODEL, blocks=blocks, is_same_node=is_same_node, gap_s=0.002 + 3e-5 * blocks)
        predictor.observe_transfer(MODEL, size_bytes=blocks * 10**6, is_same_node=is_same_node, transfer_s=0.001 + blocks * 1e-4)
    assert predictor.handoff_gap(MODEL, blocks=100, is_same_node=is_same_node).mean_s == pytest.approx(0.005, rel=0.05)
    assert predictor.transfer(MODEL, size_bytes=10**8, is_same_node=is_same_node).mean_s == pytest.approx(0.011, rel=0.05)
    assert predictor.handoff_gap_s(MODEL, blocks=100, is_same_node=not is_same_node) == elsewhere


def test_the_queue_is_predicted_by_how_fast_it_moves() -> None:
    predictor = LoadPredictor()
    assert predictor.queue_s(MODEL, ahead_s=6.0, replicas=3, now_s=0.0) == pytest.approx(2.0)
    assert predictor.queue_s(MODEL, ahead_s=6.0, replicas=0, now_s=0.0) == pytest.approx(6.0)
    predictor.note_queue(MODEL, is_waiting=True, now_s=0.0)
    for index in range(600):
        predictor.dispatched(MODEL, 0.1, index / 10)
    assert predictor.queue_s(MODEL, ahead_s=6.0, replicas=3, now_s=60.0) == pytest.approx(6.0, rel=0.1)
    assert predictor.queue_s(MODEL, ahead_s=0.0, replicas=3, now_s=60.0) == 0.0


def test_a_line_is_predicted_by_how_fast_the_lines_of_its_pool_move() -> None:
    predictor = LoadPredictor()
    for second in range(20):
        predictor.line_moved(PREFILL, work_s=0.5, waited_s=1.0, now_s=float(second))
    assert predictor.line_s(PREFILL, ahead_s=3.0, now_s=20.0) == pytest.approx(6.0, rel=0.05)
    assert predictor.line_s(DECODE, ahead_s=3.0, now_s=20.0) == 3.0


@pytest.mark.parametrize("kind", [PredictionKind.TTFT, PredictionKind.QUEUE])
def test_intervals_are_calibrated_and_scored_by_outcomes(kind: PredictionKind) -> None:
    predictor, rng = LoadPredictor(), Random(3)
    for index in range(1500):
        mean_s = rng.uniform(0.2, 2.0)
        if kind is PredictionKind.TTFT:
            predicted = predictor.ttft(MODEL, queue=Interval(0.0, 0.0), prefill=Interval(mean_s, mean_s))
        else:
            predicted = predictor.queue(MODEL, mean_s)
        predictor.observe(kind, MODEL, predicted, mean_s * rng.lognormvariate(0.0, 0.4), float(index))
    (score,) = predictor.scores.scores()
    assert (score.kind, score.outcomes_total) == (kind, 1500)
    assert score.q90_coverage == pytest.approx(0.9, abs=0.05)
    assert predictor.scores.is_trusted(MODEL)


def test_output_lengths_are_scored_with_the_rest() -> None:
    predictor = LoadPredictor()
    predictor.observe_output(MODEL, OutputEstimate(100.0, 90.0, 180.0), 120, 0.0)
    (score,) = predictor.scores.scores()
    assert (score.kind, score.q90_coverage) == (PredictionKind.OUTPUT_TOKENS, 1.0)
    assert score.mape == pytest.approx(20 / 120)


def test_settings_that_make_no_sense_are_refused() -> None:
    PredictConfig().validate()
    with pytest.raises(ConfigError):
        PredictConfig(max_models=0).validate()
