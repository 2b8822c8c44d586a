"""What the load generator needs of an endpoint, whatever it speaks. Must not know gRPC or HTTP."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.errors import ConfigError
from tandem.report import RequestRecord
from tandem.workload import PlannedRequest

# One prepared request: sends it, fills the record as messages come, returns at the end. What goes wrong at the server is told to the
# record, not raised. The record's `sent_s` is set by the caller right before.
Call = Callable[[RequestRecord], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that the endpoint offers; `context_tokens` and `engine` are None where it does not say."""

    id: str
    context_tokens: int | None
    engine: str | None = None


class Target(Protocol):
    """An endpoint under load. It belongs to one event loop."""

    kind: str
    address: str

    async def models(self) -> Sequence[ServedModel]:
        """What it serves; raises TandemError where it cannot be reached."""
        ...

    def prepare(self, request: PlannedRequest, token_ids: Sequence[int], model: str) -> Call:
        """The request made ready, so that sending it takes no time: greedy, exactly as many output tokens as planned."""
        ...

    async def close(self) -> None:
        """Frees its connections."""
        ...


def choose_model(served: Sequence[ServedModel], wanted: str | None) -> ServedModel:
    """The wanted model, or the only one served; raises ConfigError with the names. An endpoint that lists none is believed to serve it."""
    names = ", ".join(model.id for model in served)
    if wanted is None:
        if len(served) != 1:
            raise ConfigError(
                f"name a model with --model: the endpoint serves {names}" if served else "the endpoint lists no model: give --model"
            )
        return served[0]
    found = next((model for model in served if model.id == wanted), None)
    if found is None and served:
        raise ConfigError(f"no model named {wanted}: the endpoint serves {names}")
    return found or ServedModel(id=wanted, context_tokens=None)
