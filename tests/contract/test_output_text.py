"""What text of one choice keeps to: vLLM's detokeniser as we use it, the simulated engine's, and the fake that other tests use."""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from tokenizers.decoders import DecodeStream

from tandem.domain import Sampling
from tandem.engine.base import OutputText
from tandem.engine.model_files import bundled_model_path
from tandem.engine.token_text import TokenText, load_tokenizer, whole_words
from tests.fake_engine import WordText


@dataclass(frozen=True)
class Bench:
    """An implementation, and some tokens with the text of each."""

    make: Callable[[Sampling], OutputText]
    token_ids: tuple[int, ...]
    words: tuple[str, ...]
    tokenizer: Any = None


def fake_bench() -> Bench:
    return Bench(WordText, (11, 12, 13, 14, 15), ("w11 ", "w12 ", "w13 ", "w14 ", "w15 "))


def vllm_bench() -> Bench:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        from transformers import AutoTokenizer

        from tandem.engine.output_text import VllmOutputText
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    token_ids = tuple(tokenizer.encode(" for statement is used to"))
    words = tuple(tokenizer.decode([token_id]) for token_id in token_ids)
    assert words == (" for", " statement", " is", " used", " to")
    return Bench(lambda sampling: VllmOutputText(tokenizer, (1, 2, 3), sampling), token_ids, words, tokenizer)


def simulated_bench() -> Bench:
    tokenizer = load_tokenizer(bundled_model_path())
    token_ids = tuple(tokenizer.encode(" for statement is used to").ids)
    words = tuple(tokenizer.decode([token_id]) for token_id in token_ids)
    return Bench(lambda sampling: TokenText(tokenizer, (1, 2, 3), sampling), token_ids, words, tokenizer)


@pytest.fixture(scope="module", params=[fake_bench, vllm_bench, simulated_bench], ids=["fake", "vllm", "simulated"])
def bench(request: pytest.FixtureRequest) -> Bench:
    made: Bench = request.param()
    return made


def encoded(bench: Bench, text: str) -> list[int]:
    """The two tokenizers answer each in their way."""
    tokens = bench.tokenizer.encode(text)
    return list(getattr(tokens, "ids", tokens))


def added(text: OutputText, *groups: tuple[int, ...]) -> list[str | None]:
    return [text.add(group, is_stop_token=False) for group in groups]


def test_text_does_not_depend_on_how_tokens_are_grouped(bench: Bench) -> None:
    one, all_at_once = bench.make(Sampling()), bench.make(Sampling())
    taken = []
    for token_id in bench.token_ids:
        assert added(one, (token_id,)) == [None]
        taken.append(one.take(is_finished=False))
    assert tuple(taken) == bench.words
    assert added(all_at_once, bench.token_ids) == [None]
    assert all_at_once.take(is_finished=True) == "".join(bench.words)
    assert one.kept_tokens() == all_at_once.kept_tokens() == 5


def test_text_is_taken_once(bench: Bench) -> None:
    text = bench.make(Sampling())
    added(text, bench.token_ids[:2])
    assert text.take(is_finished=False) == "".join(bench.words[:2])
    assert text.take(is_finished=False) == text.take(is_finished=True) == ""


@pytest.mark.parametrize("is_grouped", [False, True])
def test_a_stop_string_over_two_tokens_ends_the_text_before_it(bench: Bench, is_grouped: bool) -> None:
    stop = bench.words[1][-2:] + bench.words[2][:2]
    text = bench.make(Sampling(stop=("never", stop)))
    groups = [bench.token_ids] if is_grouped else [(token_id,) for token_id in bench.token_ids[:3]]
    assert added(text, *groups)[-1] == stop
    assert text.kept_tokens() == 3
    assert text.take(is_finished=True) == (bench.words[0] + bench.words[1])[:-2]


def test_text_that_may_become_a_stop_string_is_held_back(bench: Bench) -> None:
    text = bench.make(Sampling(stop=("12345",)))
    added(text, bench.token_ids[:2])
    so_far = "".join(bench.words[:2])
    assert text.take(is_finished=False) == so_far[:-4]
    assert text.take(is_finished=True) == so_far[-4:]


def test_a_stop_token_counts_and_has_no_text(bench: Bench) -> None:
    text = bench.make(Sampling())
    assert text.add(bench.token_ids[:3], is_stop_token=True) is None
    assert text.take(is_finished=True) == "".join(bench.words[:2])
    assert text.kept_tokens() == 3


@pytest.mark.parametrize("min_tokens", [0, 2, 3])
def test_a_stop_string_within_the_least_tokens_is_no_stop(bench: Bench, min_tokens: int) -> None:
    text = bench.make(Sampling(stop=(bench.words[1].strip(),), min_tokens=min_tokens))
    stops = added(text, *[(token_id,) for token_id in bench.token_ids])
    assert any(stops) == (min_tokens < 2)


def test_text_of_resumed_tokens_can_be_passed_over(bench: Bench) -> None:
    text = bench.make(Sampling())
    added(text, bench.token_ids[:2])
    text.take(is_finished=False)
    added(text, bench.token_ids[2:])
    assert text.take(is_finished=False) == "".join(bench.words[2:])
    assert text.kept_tokens() == 5


@pytest.mark.parametrize("make_bench", [vllm_bench, simulated_bench])  # the fake's tokens are whole words
def test_half_a_character_is_held_back(make_bench: Callable[[], Bench]) -> None:
    bench = make_bench()
    text = bench.make(Sampling())
    taken = []
    for token_id in encoded(bench, "日本"):
        added(text, (token_id,))
        taken.append(text.take(is_finished=False))
    assert [part for part in taken if part] == ["日", "本"]
    assert taken[0] == ""


def text_after(prompt: list[int], output: list[int], make: Callable[[Sequence[int]], OutputText]) -> str:
    text = make(prompt)
    added(text, *[(token_id,) for token_id in output])
    return text.take(is_finished=True)


def makers() -> dict[str, Callable[[Sequence[int]], OutputText]]:
    """Text primed with a prompt, with vLLM and without."""
    benches = vllm_bench(), simulated_bench()
    from tandem.engine.output_text import VllmOutputText

    with_vllm, without = (bench.tokenizer for bench in benches)
    return {
        "vllm": lambda prompt: VllmOutputText(with_vllm, tuple(prompt), Sampling()),
        "simulated": lambda prompt: TokenText(without, prompt, Sampling()),
    }


@pytest.mark.parametrize("maker", ["vllm", "simulated"])
def test_output_after_a_prompt_that_ends_within_a_character_has_nothing_of_the_prompts(maker: str) -> None:
    make, tokenizer = makers()[maker], load_tokenizer(bundled_model_path())
    words, character, rest = (tokenizer.encode(part).ids for part in ("a long prompt " * 20, "日", " for it"))
    assert len(character) == 3
    assert text_after(words + character[:2], rest, make) == " for it"
    assert text_after(words + character[:2], character[2:] + rest, make) == "日 for it"
    assert text_after(words + character[:1] + character[:2], character[2:] + rest, make) == "日 for it"
    assert text_after(words + character[:1] * 40, rest, make) == " for it"
    assert text_after(words + tokenizer.encode("\ufffd").ids, rest, make) == " for it"
    assert text_after(words, character + rest, make) == "日 for it"
    assert text_after([], character + rest, make) == "日 for it"
    assert text_after(character[:2], character[2:] + rest, make) == "日 for it"


def test_output_after_any_other_prompt_is_as_vllm_gives_it() -> None:
    ours, tokenizer = makers(), load_tokenizer(bundled_model_path())
    rng, compared = Random(0), 0
    for _ in range(300):
        prompt, output = ([rng.randrange(1, 2048) for _ in range(rng.choice(lengths))] for lengths in ((1, 15, 16, 17, 60), (1, 8)))
        if tokenizer.decode(prompt).endswith("\ufffd"):
            continue
        stream, expected = DecodeStream(ids=prompt, skip_special_tokens=True), ""
        try:
            expected = "".join(stream.step(tokenizer, token_id) or "" for token_id in output)
        except Exception:  # bytes that are no text, where vLLM begins a new stream; tokenizers raises nothing narrower
            continue
        compared += 1
        assert {name: text_after(prompt, output, make) for name, make in ours.items()} == dict.fromkeys(ours, expected)
    assert compared > 100


RANDOM_STOPS = ("e", "an", "in ", "xyz", "re")


@pytest.mark.parametrize("stop", [(), RANDOM_STOPS[:1], RANDOM_STOPS])
@pytest.mark.parametrize("includes_stop", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 9])
def test_without_vllm_text_is_the_same_as_with_it(stop: tuple[str, ...], includes_stop: bool, min_tokens: int) -> None:
    benches = vllm_bench(), simulated_bench()
    sampling = Sampling(stop=stop, include_stop_str_in_output=includes_stop, min_tokens=min_tokens, skip_special_tokens=not includes_stop)
    for seed in range(30):
        rng = Random(seed)
        groups = [tuple(rng.randrange(2048) for _ in range(rng.randint(1, 4))) for _ in range(8)]
        ends_by_token = rng.random() < 0.5
        told: list[list[object]] = []
        for bench in benches:
            text = bench.make(sampling)
            said: list[object] = []
            for group in groups:
                is_stop_token = ends_by_token and group is groups[-1]
                found = text.add(group, is_stop_token=is_stop_token)
                said += [found, text.take(is_finished=found is not None), text.kept_tokens()]
                if found is not None:
                    break
            told.append([*said, text.take(is_finished=True)])
        assert told[0] == told[1]


def test_whole_words_are_text_by_themselves() -> None:
    tokenizer = load_tokenizer(bundled_model_path())
    words = whole_words(tokenizer)
    assert 1000 < len(words) < tokenizer.get_vocab_size()
    assert not set(words) & tokenizer.get_added_tokens_decoder().keys()
    assert all("�" not in tokenizer.decode([word]) for word in words)
