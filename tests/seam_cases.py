"""Samplings whose tokens depend on the output so far: what a seam between two workers could get wrong."""

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from tandem.domain import StructuredKind, StructuredOutput
from tandem.engine.model_files import bundled_model_path

JSON_SCHEMA = StructuredOutput(
    kind=StructuredKind.JSON_SCHEMA,
    value=(
        json.dumps(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 24},
                    "count": {"type": "integer", "minimum": 0, "maximum": 9999},
                    "is_new": {"type": "boolean"},
                },
                "required": ["name", "count", "is_new"],
                "additionalProperties": False,
            }
        ),
    ),
)
REGEX = StructuredOutput(kind=StructuredKind.REGEX, value=("[a-z]{3}-[0-9]{4}(x|y){5}",))
GRAMMAR = StructuredOutput(kind=StructuredKind.GRAMMAR, value=('root ::= "a" [b-f]+ "z"',))
CHOICE = StructuredOutput(kind=StructuredKind.CHOICE, value=("negative", "positive and rather long", "positive"))
JSON_OBJECT = StructuredOutput(kind=StructuredKind.JSON_OBJECT)

EXACT: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "repetition": {"repetition_penalty": 1.3},
    "all_penalties": {"presence_penalty": 0.4, "frequency_penalty": -0.3, "repetition_penalty": 1.2},
    "seed": {"seed": 11, "temperature": 0.9, "ignore_eos": True},
    "seed_filters": {"seed": 5, "temperature": 1.2, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "ignore_eos": True},
    "seed_penalties": {"seed": 2**40, "temperature": 1.0, "frequency_penalty": 0.5, "ignore_eos": True},
    "regex": {"structured_output": REGEX},
    "grammar": {"structured_output": GRAMMAR},
    "choice": {"structured_output": CHOICE},
    "json_object": {"structured_output": JSON_OBJECT},
    "seed_regex": {"structured_output": REGEX, "seed": 3, "temperature": 1.0},
}


@cache
def no_blanks() -> dict[int, float]:
    """A logit bias against tokens of white space: the bundled model indents JSON for ever."""
    tokenizer = Tokenizer.from_file(str(bundled_model_path() / "tokenizer.json"))
    return {token: -100.0 for token in range(tokenizer.get_vocab_size()) if tokenizer.decode([token]).isspace()}
