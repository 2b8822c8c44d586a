"""Which steps are kept where there are too many."""

from tandem.step_reservoir import StepReservoir
from tandem.step_sample import StepSample


def prefill(number: int) -> StepSample:
    return StepSample(prefill_tokens=number, prefill_pairs=number, decode_requests=0, kv_tokens=0, duration_s=0.01)


def decode(number: int) -> StepSample:
    return StepSample(prefill_tokens=0, prefill_pairs=0, decode_requests=number, kv_tokens=number, duration_s=0.01)


def test_steps_are_taken_once_and_in_order() -> None:
    reservoir = StepReservoir(4)
    reservoir.add([decode(1), prefill(2)])
    reservoir.add([decode(3)])
    assert reservoir.take() == (decode(1), prefill(2), decode(3))
    assert reservoir.take() == ()


def test_of_one_kind_the_newest_stay() -> None:
    reservoir = StepReservoir(4)
    reservoir.add(decode(number) for number in range(1, 11))
    assert reservoir.take() == tuple(decode(number) for number in range(7, 11))


def test_the_rare_kind_stays_among_many_of_the_other() -> None:
    reservoir = StepReservoir(4)
    reservoir.add([prefill(1), *(decode(number) for number in range(1, 11))])
    assert reservoir.take() == (prefill(1), decode(8), decode(9), decode(10))
    reservoir.add([decode(1), *(prefill(number) for number in range(1, 11))])
    assert reservoir.take() == (decode(1), prefill(8), prefill(9), prefill(10))
