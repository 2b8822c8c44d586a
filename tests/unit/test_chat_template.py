"""A model's chat template: what it may use, and that whatever is wrong with it is a typed error."""

import json

import pytest

from router.chat_template import ChatTemplate
from tandem.errors import ConfigError, InvalidRequestError, Reason

HELLO = [{"role": "user", "content": "hello"}]


def compiled(source: str) -> ChatTemplate:
    template = ChatTemplate.compile(None, source.encode())
    assert template is not None
    return template


def test_a_generation_block_is_its_body() -> None:
    source = "{% for m in messages %}{% generation %}<{{ m.content }}>{% set x = 1 %}{% endgeneration %}{% endfor %}{{ x is defined }}"
    assert compiled(source).render(HELLO) == "<hello>False"


def test_json_is_written_as_transformers_does() -> None:
    value = "{'b': '<\u00e9>', 'a': [1]}"
    assert compiled(f"{{{{ {value}|tojson }}}}").render(HELLO) == '{"b": "<\u00e9>", "a": [1]}'
    options = "ensure_ascii=true, indent=1, separators=(',', ':'), sort_keys=true"
    expected = json.dumps({"b": "<\u00e9>", "a": [1]}, ensure_ascii=True, indent=1, separators=(",", ":"), sort_keys=True)
    assert compiled(f"{{{{ {value}|tojson({options}) }}}}").render(HELLO) == expected


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        (b"{", None),
        (b"[]", None),
        (b"\xff", b"{{ messages }}"),
        (b'{"chat_template": ["x"]}', None),
        (b'{"chat_template": [{"name": "default"}]}', None),
        (b'{"chat_template": "{% nonsense %}"}', None),
        (None, b"{% if %}"),
        (None, b"\xff"),
    ],
)
def test_a_damaged_file_is_an_error_that_says_what_to_do(settings: bytes | None, source: bytes | None) -> None:
    with pytest.raises(ConfigError, match="send text or token ids") as caught:
        ChatTemplate.compile(settings, source)
    assert caught.value.reason is Reason.BAD_MODEL


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ range(10 ** 9) }}", "{{ messages[5].x }}", "{{ 5.real() }}"]
)
def test_whatever_a_template_does_wrong_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="refuses the messages"):
        compiled(source).render(HELLO)


def test_a_model_without_a_template_has_none() -> None:
    assert ChatTemplate.compile(None, None) is None
    assert ChatTemplate.compile(b'{"chat_template": [{"name": "tool", "template": "x"}]}', None) is None
