"""What the router's live trials send, and what they make of it; the clusters themselves take half an hour."""

import asyncio
import json
from random import Random

import pytest

from tandem.client import AsyncClient
from tandem.domain import PredictedTerm, Receipt, RequestId
from tandem.tenancy import Tenant, hash_key
from tandem.trials import __main__ as command
from tandem.trials.overload import climb, peak
from tandem.trials.prediction import judge_ttft
from tandem.trials.sending import Outcome, fresh_prompt, keep_busy, poisson, send
from tests.integration.fake_worker import Faults, serve_workers
from tests.integration.router_shell import serve_router

pytestmark = pytest.mark.integration


async def test_a_request_is_told_with_its_tokens_and_receipt_or_its_reason() -> None:
    tenants = (Tenant(name="one", key_sha256=(hash_key("sk-one"),)),)
    async with serve_workers(decode_0=Faults()) as workers, serve_router(workers, tenants=tenants) as router:
        async with AsyncClient(router.address, api_key="sk-one") as client:
            good = await send(client, fresh_prompt(Random(1), 40), max_tokens=3)
        async with AsyncClient(router.address, api_key="sk-other") as client:
            refused = await send(client, [1, 2, 3], max_tokens=3)
    assert (good.prompt_tokens, good.output_tokens, good.error) == (40, 3, "")
    assert good.receipt is not None
    assert good.first_s is not None
    assert good.sent_s <= good.first_s <= good.ended_s
    assert (refused.error, refused.first_s, refused.receipt) == ("bad_key", None, None)


async def test_a_closed_loop_keeps_so_many_in_flight_and_an_open_loop_sends_whatever_comes_back() -> None:
    running, most = 0, 0

    async def answer(pause_s: float) -> Outcome:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(pause_s)
            return Outcome(sent_s=0.0, prompt_tokens=1)
        finally:
            running -= 1

    closed = await keep_busy(lambda: asyncio.create_task(answer(0.01)), 3, 0.2)
    assert most == 3
    assert running == 0
    assert len(closed) >= 3
    opened = await poisson(lambda: asyncio.create_task(answer(0.5)), 100.0, 0.3, Random(1))
    assert len(opened) == most > 3


def test_errors_and_coverage_follow_from_receipts() -> None:
    def outcome(predicted_s: float, q90_s: float, actual_s: float) -> Outcome:
        terms = (
            PredictedTerm(name="ttft_s", predicted=predicted_s, actual=actual_s),
            PredictedTerm(name="ttft_q90_s", predicted=q90_s, actual=actual_s),
        )
        return Outcome(sent_s=0.0, prompt_tokens=1, receipt=Receipt(request_id=RequestId("r"), predicted=terms))

    judged = judge_ttft([outcome(1.0, 2.0, 2.0), outcome(3.0, 3.5, 4.0)])
    assert judged == {"ttft_error": pytest.approx(0.375), "ttft_q90_coverage": 0.5}


@pytest.mark.parametrize(
    ("goodputs_rps", "offered", "best_rps", "full_rps"),
    [
        ((10, 15, 20, 25, 30, 35, 40), 7, 40, 7),  # to the largest rate
        ((10, 15, 20, 16, 12, 99), 5, 20, 3),  # until it has fallen twice
        ((10, 9, 20, 21, 21, 21, 99), 6, 21, 4),  # a dip is no peak
        ((10, 15, 15.2, 15.3, 99), 4, 15.3, 2),  # until it has twice not grown
        ((10, 15, 14.9, 17, 17.1, 17.2, 99), 6, 17.2, 4),  # once is no end
        ((0, 0, 9), 2, 0, 1),  # a fleet that serves nobody
    ],
)
async def test_rates_rise_until_goodput_has_had_its_peak(
    goodputs_rps: tuple[float, ...], offered: int, best_rps: float, full_rps: float
) -> None:
    async def offer(rate_rps: float) -> dict[str, float]:
        return {"rate_rps": rate_rps, "goodput_rps": goodputs_rps[int(rate_rps) - 1]}

    steps = await climb(offer, range(1, len(goodputs_rps) + 1))
    assert len(steps) == offered
    assert peak(steps) == (best_rps, full_rps)


def test_a_trial_that_does_not_exist_is_answered_with_those_that_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["trials", "speed", "--json", json.dumps("x")])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    assert "no trial named 'speed'; there are continuation, prediction, tenants, overload" in capsys.readouterr().err
