"""A plan that no router made, or that is out of date, handed to real workers: a typed error or a recompute, never a wrong token."""

import itertools
import math
from collections.abc import Callable

import pytest

from tandem.convert import chunk_from_pb
from tandem.domain import Role
from tandem.errors import InvalidRequestError, ProtocolError, Reason, TandemError, UnavailableError
from tandem.rpc import open_channel, open_stream
from tandem.v1 import common_pb2, inference_pb2, worker_pb2
from tests.integration.conftest import Cluster
from tests.integration.test_handoff import settle

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

PROMPT = [(11 * number) % 2000 + 3 for number in range(150)]
MAX_TOKENS = 12
Message = worker_pb2.WorkerGenerateRequest
Change = Callable[[Message], object]
numbers = itertools.count()


def planned(cluster: Cluster, name: str) -> common_pb2.PlannedWorker:
    """The worker as a plan names it."""
    report = cluster.platform.supervisors[name].report
    return common_pb2.PlannedWorker(replica_id=name, incarnation=report.incarnation, address=report.address)


def message_for(cluster: Cluster) -> Message:
    """What a router would send to the decode worker, its prefill worker named."""
    prefill, decode = planned(cluster, "prefill-0"), planned(cluster, "decode-0")
    return Message(
        request_id=f"forged-{next(numbers)}",
        attempt=1,
        model="bundled",
        prompt_token_ids=PROMPT,
        sampling=common_pb2.Sampling(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True),
        plan=common_pb2.Plan(plan_id="forged", prefill=[prefill], decode=decode, router_id="nobody"),
        incarnation=decode.incarnation,
    )


async def send(cluster: Cluster, message: Message) -> tuple[list[int], common_pb2.Receipt]:
    """Straight to the decode worker."""
    token_ids: list[int] = []
    channel = open_channel(cluster.platform.replicas["decode-0"].address)
    try:
        async with open_stream(channel, "tandem.v1.Worker/Generate", message, timeout_s=30.0) as stream:
            async for payload in stream:
                chunk = chunk_from_pb(inference_pb2.GenerateResponse.FromString(payload))
                assert chunk.first_position == len(message.resume_token_ids) + len(token_ids)
                token_ids += chunk.token_ids
            receipt = common_pb2.Receipt.FromString(await stream.receipt() or b"")
    finally:
        await channel.close(None)
    return token_ids, receipt


def set_prefill(**fields: object) -> Change:
    def change(message: Message) -> None:
        for name, value in fields.items():
            setattr(message.plan.prefill[0], name, value)

    return change


def extend_prefill(count: int) -> Change:
    return lambda message: message.plan.prefill.extend([message.plan.prefill[0]] * count)


REFUSED: list[tuple[str, Change, type[TandemError], str]] = [
    ("of an earlier life of this worker", lambda message: setattr(message.plan.decode, "incarnation", 5), UnavailableError, "not 5"),
    ("for another worker", lambda message: setattr(message.plan.decode, "replica_id", "decode-7"), UnavailableError, "not decode-7"),
    ("of a call for an earlier life", lambda message: setattr(message, "incarnation", 5), UnavailableError, "not 5"),
    ("for another model", lambda message: setattr(message, "model", "other"), InvalidRequestError, "not 'other'"),
    ("without a decode worker", lambda message: message.plan.ClearField("decode"), ProtocolError, "no decode worker"),
    ("empty", lambda message: message.ClearField("plan"), ProtocolError, "no decode worker"),
    ("with a slack that is no time", lambda message: setattr(message.plan, "slack_s", math.nan), InvalidRequestError, "plan.slack_s"),
    ("with endless slack", lambda message: setattr(message.plan, "slack_s", math.inf), InvalidRequestError, "plan.slack_s"),
    ("with a prefill worker without an address", set_prefill(address=""), InvalidRequestError, "is not HOST:PORT"),
    ("with an address that is none", set_prefill(address="nowhere at all"), InvalidRequestError, "is not HOST:PORT"),
    ("with many addresses in one", set_prefill(address="a:1,b:1,c:1"), InvalidRequestError, "is not HOST:PORT"),
    ("with prefill workers without end", extend_prefill(16), InvalidRequestError, "at most 16"),
]


@pytest.mark.parametrize(("change", "error", "word"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
async def test_a_plan_is_refused(cluster: Cluster, change: Change, error: type[TandemError], word: str) -> None:
    message = message_for(cluster)
    change(message)
    with pytest.raises(error, match=word) as caught:
        await send(cluster, message)
    assert caught.value.reason is not Reason.BUG
    await settle(cluster)


LOST = "prefill_lost"
RECOMPUTED: list[tuple[str, Change, str]] = [
    ("a prefill worker's earlier life", set_prefill(incarnation=5), LOST),
    ("a name of somebody else", set_prefill(replica_id="prefill-9"), LOST),
    ("an address where nobody listens", set_prefill(address="127.0.0.1:1"), LOST),
    ("blocks that are not there", lambda message: setattr(message.plan.manifest, "cached_blocks", 2**32 - 1), ""),
    ("blocks of a node that is none", lambda message: message.plan.manifest.holders.add(node="nowhere", num_blocks=2**31), ""),
    ("the latest start there is", lambda message: setattr(message.plan, "slack_s", -1.7e308), ""),
    ("the earliest start there is", lambda message: setattr(message.plan, "slack_s", 1.7e308), ""),
    ("less to compute than there is", lambda message: setattr(message.plan, "prefill_tokens", 1), ""),
    ("more to compute than there is", lambda message: setattr(message.plan, "prefill_tokens", 2**32 - 1), ""),
]


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in RECOMPUTED], ids=[case[0] for case in RECOMPUTED])
async def test_a_plan_that_names_what_is_not_so_costs_no_token(cluster: Cluster, change: Change, reason: str) -> None:
    expected = await cluster.plain.run(PROMPT, MAX_TOKENS)
    message = message_for(cluster)
    change(message)
    token_ids, receipt = await send(cluster, message)
    assert token_ids == expected.token_ids
    assert receipt.one_worker_reason == reason
    assert receipt.handed_off == (not reason)
    await settle(cluster)


async def test_a_prefill_worker_that_is_none_is_passed_over(cluster: Cluster) -> None:
    """A router answers, and Redis would: neither speaks as a worker does."""
    expected = await cluster.plain.run(PROMPT, MAX_TOKENS)
    for address in (cluster.platform.router_address, cluster.platform.http_address):
        message = message_for(cluster)
        set_prefill(address=address)(message)
        token_ids, receipt = await send(cluster, message)
        assert token_ids == expected.token_ids
        assert receipt.one_worker_reason == LOST
    await settle(cluster)


async def test_resumed_tokens_under_an_old_plan_go_on_exactly(cluster: Cluster) -> None:
    expected = await cluster.plain.run(PROMPT, MAX_TOKENS)
    message = message_for(cluster)
    message.resume_token_ids.extend(expected.token_ids[:5])
    set_prefill(incarnation=5)(message)
    token_ids, receipt = await send(cluster, message)
    assert token_ids == expected.token_ids[5:]
    assert receipt.one_worker_reason == LOST
    await settle(cluster)


async def test_a_prefill_worker_of_another_model_gives_no_token(cluster: Cluster) -> None:
    """The plan leads to a worker that runs, with tokens of its own: what it says must not become the first token."""
    await cluster.platform.add_replica(Role.PREFILL, "stranger", served_model="stranger")
    try:
        message = message_for(cluster)
        stranger = planned(cluster, "stranger")
        message.plan.prefill[0].CopyFrom(stranger)
        with pytest.raises(InvalidRequestError, match="serves 'stranger'"):
            await send(cluster, message)
        same_name = worker_pb2.PrefillRequest(request_id="forged", model="stranger", prompt_token_ids=PROMPT, namespace="other weights")
        with pytest.raises(UnavailableError, match="not of other weights"):
            await prefill(stranger.address, same_name)
    finally:
        await cluster.platform.remove_replica("stranger")
    await settle(cluster)


PREFILL: list[tuple[str, dict[str, object], type[TandemError], str]] = [
    ("tokens that are none", {"prompt_token_ids": [5, 2**31]}, InvalidRequestError, "not in the vocabulary"),
    ("nothing to compute", {"prompt_token_ids": []}, InvalidRequestError, "prompt"),
    ("more resumed tokens than tokens", {"prompt_token_ids": [5, 6], "resumed_tokens": 3}, InvalidRequestError, "prompt"),
    ("a prompt over the context", {"prompt_token_ids": [7] * 5000}, InvalidRequestError, "4096"),
    ("several choices", {"sampling": common_pb2.Sampling(n=2, temperature=1.0)}, InvalidRequestError, "sampling.n"),
    ("a slack that is no time", {"slack_s": math.nan}, InvalidRequestError, "slack_s"),
    ("another model", {"model": "other"}, InvalidRequestError, "not 'other'"),
    ("another replica", {"replica_id": "prefill-9"}, UnavailableError, "not prefill-9"),
    ("an earlier life", {"incarnation": 5}, UnavailableError, "not 5"),
    ("blocks of other weights", {"namespace": "other"}, UnavailableError, "not of other"),
]


@pytest.mark.parametrize(("fields", "error", "word"), [case[1:] for case in PREFILL], ids=[case[0] for case in PREFILL])
async def test_a_prefill_worker_refuses(cluster: Cluster, fields: dict[str, object], error: type[TandemError], word: str) -> None:
    message = worker_pb2.PrefillRequest(**{"request_id": "forged", "model": "bundled", "prompt_token_ids": PROMPT, **fields})  # type: ignore[arg-type]
    with pytest.raises(error, match=word):
        await prefill(cluster.platform.replicas["prefill-0"].address, message)
    await settle(cluster)


async def prefill(address: str, message: worker_pb2.PrefillRequest) -> None:
    """Straight to the prefill worker."""
    channel = open_channel(address)
    try:
        async with open_stream(channel, "tandem.v1.Worker/Prefill", message, timeout_s=30.0) as stream:
            async for _ in stream:
                pass
    finally:
        await channel.close(None)
