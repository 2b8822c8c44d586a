"""Which URLs are a REDIS_URL, and what is shown of one. No connection is made."""

import pytest

from tandem.errors import ConfigError
from tandem.redis_link import RedisLink


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost", "redis://localhost"),
        ("redis://localhost/", "redis://localhost/"),
        ("redis://10.0.0.1:6380/2", "redis://10.0.0.1:6380/2"),
        ("redis://:secret@host:6379/0", "redis://host:6379/0"),
        ("redis://user:secret@[::1]:6379", "redis://[::1]:6379"),
        ("rediss://user:secret@host?ssl_ca_certs=ca.pem", "rediss://host"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("unix:///run/redis.sock?db=1&password=secret", "unix:///run/redis.sock"),
    ],
)
def test_a_url_is_taken_and_shown_without_its_password(url: str, shown: str) -> None:
    assert RedisLink(url, timeout_s=1.0).name == shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "localhost",
        "http://localhost:6379",
        "redis://",
        "redis://:6379",
        "redis://:secret@",
        "redis://host:secret",
        "redis://host:0",
        "redis://host:99999",
        "redis://host/db",
        "redis://host/0/1",
        "redis://host?db=secret",
        "redis://[::1",
        "redis://user:se/cret@host",
        "unix://run/redis.sock",
        "unix://redis.sock",
        "unix:///redis.sock?db",
        "unix:///redis.sock?socket_timeout=99",
        "redis://host?ssl_ca_certs=ca.pem",
        "rediss://host?ssl_other=1",
        "redis://host?protocol=3",
    ],
)
def test_any_other_url_is_refused_with_what_is_expected(url: str) -> None:
    with pytest.raises(ConfigError, match="REDIS_URL") as caught:
        RedisLink(url, timeout_s=1.0)
    assert "expected redis://" in caught.value.message
    assert "cret" not in caught.value.message.split("expected")[0]
