"""What `tandem up` refuses before it starts anything: keys and values of [router] and [scaler]."""

from pathlib import Path
from typing import Any

import pytest

from router.policies import POLICIES
from tandem.cluster_config import load_cluster_config
from tandem.errors import ConfigError
from tandem.preflight import check


def refused(folder: Path, text: str, **flags: Any) -> str:
    """The words of the refusal of a cluster's file, without the file's name, which they begin with."""
    path = folder / "cluster.toml"
    path.write_text(text)
    config = load_cluster_config(path, flags, {})
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.message.startswith(str(path))
    return caught.value.message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[router]\ntick_s = 'fast'\n", ": router.tick_s must be a number, got 'fast'"),
        ("[router]\nmax_queued_requests = 2.5\n", ": router.max_queued_requests must be a whole number, got 2.5"),
        ("[router]\nhandoff_min_tokens = 'x'\n", ": router.handoff_min_tokens must be a whole number, got 'x'"),
        ("[router]\nqueue_order = 'best'\n", ": router.queue_order must be slack or shortest, got 'best'"),
        ("[router]\nqueue_order = 1\n", ": router.queue_order must be slack or shortest, got 1"),
        ("[router]\npolicy = 'best'\n", f" or a flag: router.policy must be one of: {', '.join(POLICIES)}; got 'best'"),
        ("[router]\ntick_s = 0.0\n", " or a flag: router.tick_s must be above 0, got 0.0"),
        ("[scaler]\nidle_s = -1.0\n", ": scaler.idle_s must be a finite number above 0, got -1.0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file_and_what_is_valid(tmp_path: Path, text: str, words: str) -> None:
    assert refused(tmp_path, text) == words


@pytest.mark.parametrize(
    ("text", "words", "others"),
    [
        (
            "[router]\nqueue_oder = 'slack'\n",
            ": router.unknown key 'queue_oder'; the nearest valid one is 'queue_order', and all are ",
            "policy",
        ),
        ("[scaler]\nidle = 1.0\n", ": scaler.unknown key 'idle'; the nearest valid one is 'idle_s', and all are ", "cooldown_s"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_and_all_that_there_are(tmp_path: Path, text: str, words: str, others: str) -> None:
    message = refused(tmp_path, text)
    assert message.startswith(words)
    assert others in message.split(", ")


@pytest.mark.parametrize("key", ["router_id", "cluster"])
def test_what_each_router_is_given_is_no_key_of_the_file(tmp_path: Path, key: str) -> None:
    message = refused(tmp_path, f"[router]\n{key} = 'a'\n")
    assert message.startswith(f": router.unknown key '{key}'")
    assert key not in message.partition("; ")[2]


def test_a_policy_of_a_flag_is_not_blamed_on_the_file_alone(tmp_path: Path) -> None:
    assert refused(tmp_path, "port = 1000\n", router={"policy": "best"}).startswith(" or a flag: router.policy must be one of: ")


def test_without_a_file_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^router\.policy must be one of: "):
        check(load_cluster_config(None, {"router": {"policy": "best"}}, {}))


def test_every_queue_order_of_a_file_is_taken(tmp_path: Path) -> None:
    for order in ("slack", "shortest"):
        assert "scaler.idle_s" in refused(tmp_path, f"[router]\nqueue_order = '{order}'\n[scaler]\nidle_s = 0.0\n")
