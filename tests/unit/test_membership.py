"""Members travel as one line of JSON; what only another version can have written is told from what is damaged."""

import json

import pytest

from tandem.errors import ProtocolError
from tandem.membership import Member, MemberKind, member_from_json

MEMBER = Member(kind=MemberKind.ROUTER, member_id="router-0", incarnation=2**62, pid=7, address="a:1", http_address="a:2", state="ready")


def test_a_member_comes_back_as_it_was() -> None:
    text = MEMBER.to_json()
    assert "\n" not in text
    assert member_from_json(text) == MEMBER
    assert member_from_json(text.encode()) == MEMBER


def test_keys_of_a_newer_version_are_passed_over() -> None:
    assert member_from_json(json.dumps({**json.loads(MEMBER.to_json()), "colour": "blue"})) == MEMBER


@pytest.mark.parametrize(
    "text", ["", "{", "7", "[]", "{}", '{"kind": "router"}', '{"kind": "cat", "member_id": "a", "incarnation": 1}', b"\xff"]
)
def test_what_is_no_member_is_refused(text: str | bytes) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        member_from_json(text)
