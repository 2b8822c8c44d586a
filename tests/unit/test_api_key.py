"""Where a client's key comes from, and that no error repeats it."""

import pytest

from tandem.api_key import key_metadata
from tandem.errors import ConfigError


def test_the_argument_goes_before_the_environment() -> None:
    assert key_metadata("sk-a", {"TANDEM_API_KEY": "sk-b"}) == (("authorization", "Bearer sk-a"),)
    assert key_metadata(None, {"TANDEM_API_KEY": "sk-b"}) == (("authorization", "Bearer sk-b"),)


def test_without_a_key_none_is_sent() -> None:
    assert key_metadata(None, {}) == key_metadata(None, {"TANDEM_API_KEY": ""}) == key_metadata("", {"TANDEM_API_KEY": "sk-b"}) == ()


@pytest.mark.parametrize("key", ["sk a", "sk\n", "ключ", "\x7f"])
def test_a_key_that_cannot_travel_is_refused_and_not_repeated(key: str) -> None:
    for api_key, environ, source in ((key, {}, "api_key"), (None, {"TANDEM_API_KEY": key}, "TANDEM_API_KEY")):
        with pytest.raises(ConfigError) as caught:
            key_metadata(api_key, environ)
        assert caught.value.message.startswith(source)
        assert key not in caught.value.message
