"""What a core finds out about a disturbance is written down, with the moment."""

from router.interval import PredictionKind
from router.pool_times import PoolKey
from router.predict import LoadPredictor
from tandem.domain import ModelId
from tandem.sim.watch import NamedStraggler, TrustChange, Watch
from tandem.step_sample import StepSample

MODEL = ModelId("m")
POOL = PoolKey("m", "gpu", "prefill")


def score(predictor: LoadPredictor, actual: float, outcomes: int) -> None:
    for _ in range(outcomes):
        predictor.scores.observe(PredictionKind.PREFILL, MODEL, predicted=1.0, q90=1.2, actual=actual, now_s=0.0)


def step(predictor: LoadPredictor, replica_id: str, duration_s: float, now_s: float) -> None:
    sample = StepSample(prefill_tokens=1000, prefill_pairs=500_000, decode_requests=0, kv_tokens=0, duration_s=duration_s)
    predictor.pools.observe(POOL, replica_id, [sample], now_s)


def test_a_straggler_is_named_once_with_the_seconds_since_the_disturbance() -> None:
    predictor = LoadPredictor()
    watch = Watch(predictor, MODEL)
    for second in range(200):
        if second == 100:
            watch.disturbed(100.0)
        for replica_id in ("a", "b", "c"):
            step(predictor, replica_id, 0.2 if replica_id == "b" and second >= 100 else 0.1, float(second))
        watch.look(float(second))
    (named,) = watch.stragglers
    assert isinstance(named, NamedStraggler)
    assert named.replica_id == "b"
    assert 15.0 < named.after_s < 30.0


def test_changes_of_trust_are_counted_in_requests_since_the_disturbance() -> None:
    predictor = LoadPredictor()
    watch = Watch(predictor, MODEL)
    watch.ended(1.0)
    score(predictor, 9.0, 60)
    watch.ended(2.0)
    watch.disturbed(10.0)
    score(predictor, 1.0, 900)
    watch.ended(12.0)
    watch.ended(13.0)
    assert watch.trust_changes == (
        TrustChange(is_trusted=False, after_s=-8.0, after_requests=0),
        TrustChange(is_trusted=True, after_s=2.0, after_requests=1),
    )
