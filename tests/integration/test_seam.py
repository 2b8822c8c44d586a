"""What crosses the seam between two workers is what one plain engine gives: stops, EOS, limits, logprobs, usage, text."""

import json
import math

import pytest

import tandem
from tandem.demo import DirectCaller
from tandem.domain import FinishReason
from tests.integration.conftest import Cluster
from tests.seam_cases import EXACT, JSON_SCHEMA, no_blanks

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

EOS = 0


async def both(cluster: Cluster, token_ids: list[int], **options: object) -> tuple[tandem.Completion, tandem.Completion]:
    """The same request handed off and, with a prompt salted to one worker by n = 1 and no prefill, on the plain replica."""
    ours = await cluster.client.generate(token_ids, **{"temperature": 0.0, **options})  # type: ignore[arg-type]
    plain = await plain_completion(cluster.plain, token_ids, **{"temperature": 0.0, **options})
    return ours, plain


async def plain_completion(plain: DirectCaller, token_ids: list[int], **options: object) -> tandem.Completion:
    """A request with any sampling on the plain replica."""
    return await plain.complete(token_ids, tandem.Sampling(**options))  # type: ignore[arg-type]


def same(ours: tandem.Completion, plain: tandem.Completion) -> None:
    assert ours.token_ids == plain.token_ids
    assert ours.text == plain.text
    assert ours.finish_reason == plain.finish_reason
    assert ours.stop_reason == plain.stop_reason
    assert ours.usage is not None
    assert plain.usage is not None
    assert (ours.usage.prompt_tokens, ours.usage.output_tokens) == (plain.usage.prompt_tokens, plain.usage.output_tokens)


async def test_one_output_token_needs_no_second_worker(cluster: Cluster) -> None:
    ours, plain = await both(cluster, cluster.prompts.next(200), max_tokens=1)
    same(ours, plain)
    assert ours.finish_reason is FinishReason.LENGTH
    assert ours.receipt is not None
    assert ours.receipt.prefill_replica_id == "prefill-0"
    assert not ours.receipt.handed_off


async def test_end_of_sequence_as_first_token_ends_the_stream(cluster: Cluster) -> None:
    ours, plain = await both(cluster, cluster.prompts.next(200), max_tokens=20, logit_bias={EOS: 100.0})
    same(ours, plain)
    assert ours.token_ids == (EOS,)
    assert ours.finish_reason is FinishReason.STOP
    assert ours.text == ""


async def test_min_tokens_counts_across_the_seam(cluster: Cluster) -> None:
    for min_tokens in (1, 2, 5):
        ours, plain = await both(cluster, cluster.prompts.next(200), max_tokens=9, min_tokens=min_tokens, logit_bias={EOS: 100.0})
        same(ours, plain)
        assert len(ours.token_ids) == min_tokens + 1


async def test_ignored_end_of_sequence_goes_on(cluster: Cluster) -> None:
    ours, plain = await both(cluster, cluster.prompts.next(200), max_tokens=6, ignore_eos=True, logit_bias={EOS: 100.0})
    same(ours, plain)
    assert ours.token_ids == (EOS,) * 6


async def test_stop_strings_that_span_the_seam_are_found(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(200)
    whole = await cluster.plain.run(token_ids, 30)
    for start, length in ((0, 1), (0, 6), (1, 3), (4, 9), (12, 2)):
        stop = whole.text[start : start + length]
        ours, plain = await both(cluster, token_ids, max_tokens=30, stop=(stop,))
        same(ours, plain)
        assert ours.finish_reason is FinishReason.STOP
        assert ours.stop_reason == stop
        assert stop not in ours.text
        ours, plain = await both(cluster, token_ids, max_tokens=30, stop=(stop,), include_stop_str_in_output=True)
        same(ours, plain)
        assert ours.text.endswith(stop)


async def test_stop_token_ids_end_on_either_side_of_the_seam(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(200)
    whole = await cluster.plain.run(token_ids, 30)
    for position in (0, 1, 7):
        stop_token = whole.token_ids[position]
        ours, plain = await both(cluster, token_ids, max_tokens=30, stop_token_ids=(stop_token,))
        same(ours, plain)
        assert ours.stop_reason == str(stop_token)


async def test_logprobs_are_one_engines_on_both_sides(cluster: Cluster) -> None:
    ours, plain = await both(cluster, cluster.prompts.next(300), max_tokens=8, logprobs=3)
    same(ours, plain)
    assert len(ours.logprobs) == 8
    for one, other in zip(ours.logprobs, plain.logprobs, strict=True):
        assert one.sampled.token_id == other.sampled.token_id
        assert [entry.token_id for entry in one.top] == [entry.token_id for entry in other.top]
        assert len(one.top) == 3
        assert math.isclose(one.sampled.logprob, other.sampled.logprob, abs_tol=1e-4)


@pytest.mark.parametrize("name", EXACT)
async def test_what_counts_or_constrains_output_is_exact_across_the_hand_off(cluster: Cluster, name: str) -> None:
    ours, plain = await both(cluster, cluster.prompts.next(200), max_tokens=40, **EXACT[name])
    same(ours, plain)
    assert ours.receipt is not None
    assert ours.receipt.handed_off
    assert (ours.receipt.one_worker_reason, ours.receipt.not_exact) == ("", ())


async def test_json_by_schema_is_handed_off_and_parses(cluster: Cluster) -> None:
    ours, plain = await both(cluster, cluster.prompts.next(200), max_tokens=200, structured_output=JSON_SCHEMA, logit_bias=no_blanks())
    same(ours, plain)
    assert set(json.loads(ours.text)) == {"name", "count", "is_new"}
    assert ours.receipt is not None
    assert ours.receipt.handed_off


async def test_seeded_choices_are_those_of_one_engine(cluster: Cluster) -> None:
    ours, plain = await both(cluster, cluster.prompts.next(200), max_tokens=12, n=3, seed=5, temperature=2.0)
    assert len({choice.token_ids for choice in ours.choices}) > 1
    assert [choice.token_ids for choice in ours.choices] == [choice.token_ids for choice in plain.choices]
    assert [choice.text for choice in ours.choices] == [choice.text for choice in plain.choices]


async def test_sampling_without_a_seed_is_handed_off_and_varies(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(200)
    answers = [await cluster.client.generate(token_ids, max_tokens=16, temperature=1.5) for _ in range(3)]
    assert len({answer.token_ids for answer in answers}) > 1
    # Equal prompts are found where they decode from the second on, so others show that each is handed off.
    others = [await cluster.client.generate(cluster.prompts.next(200), max_tokens=16, temperature=1.5) for _ in range(2)]
    assert all(answer.receipt is not None and answer.receipt.handed_off for answer in (answers[0], *others))


async def test_resumed_tokens_are_continued_not_repeated(cluster: Cluster) -> None:
    token_ids = cluster.prompts.next(300)
    whole = await cluster.plain.run(token_ids, 40)
    for cut in (1, 15, 39):
        rest = await cluster.client.generate(token_ids, max_tokens=40, temperature=0.0, resume_token_ids=whole.token_ids[:cut])
        assert list(rest.token_ids) == whole.token_ids[cut:], cut
        assert whole.text.endswith(rest.text)
        assert rest.usage is not None
        assert rest.usage.output_tokens == 40


async def test_text_and_chat_prompts_are_tokenised_as_the_model_wants(cluster: Cluster) -> None:
    text = await cluster.client.generate("The if statement", max_tokens=8, temperature=0.0)
    assert text.usage is not None
    assert len(text.text) > 0
    chat = await cluster.client.generate([{"role": "user", "content": "Why does Python use indentation?"}], max_tokens=40, temperature=0.0)
    assert chat.usage is not None
    assert chat.usage.prompt_tokens > 5
