"""The half of a token stream that both clients share: bytes in, checked chunks out. Does no I/O."""

from dataclasses import replace
from random import Random

from tandem.convert import chunk_from_pb, receipt_from_pb
from tandem.deadline import Deadline
from tandem.domain import MAX_REQUEST_ID_CHARS, Chunk, Receipt, RequestId
from tandem.errors import TandemError
from tandem.generate_request import PreparedRequest
from tandem.rpc import parse_answer
from tandem.session import CLIENT_RETRIES, Session
from tandem.v1 import common_pb2, inference_pb2

GENERATE = "tandem.v1.Inference/Generate"
LIST_MODELS = "tandem.v1.Inference/ListModels"
GET_STATUS = "tandem.v1.Control/GetStatus"
EXPLAIN = "tandem.v1.Router/Explain"
SET_TARGET = "tandem.v1.Control/SetTarget"
DRAIN_REPLICA = "tandem.v1.Control/DrainReplica"
# A whole generation on a busy cluster, and a question to a router that is well.
DEFAULT_TIMEOUT_S = 600.0
QUERY_TIMEOUT_S = 10.0


class ChunkReader:
    """Parses and joins the messages of one request, over as many streams as it takes; `receipt` is None until its end."""

    def __init__(self, request: PreparedRequest, rng: Random) -> None:
        self._request = request
        self._session = Session(CLIENT_RETRIES, rng, first_position=request.first_position, num_choices=request.num_choices)
        self._deadline: Deadline | None = None
        self.receipt: Receipt | None = None

    def message(self) -> inference_pb2.GenerateRequest:
        """What to send now: the request, and after a lost stream the tokens that came, under an id of its own."""
        request, tries = self._request.message, self._session.tries
        if tries == 1:
            return request
        message = inference_pb2.GenerateRequest()
        message.CopyFrom(request)
        message.resume_token_ids.extend(self._session.joiner.token_ids() if self._session.output_tokens else ())
        message.first_position = len(message.resume_token_ids)
        if request.request_id:  # a router that lives may still hold the stream before
            message.request_id = f"{request.request_id[: MAX_REQUEST_ID_CHARS - 4]}~{tries}"
        return message

    def timeout_s(self) -> float | None:
        """Seconds left of the whole request, which begins with the first call. Raises DeadlineError."""
        if self._deadline is None:
            self._deadline = Deadline(self._request.timeout_s)
        return self._deadline.remaining_s("continuation")

    def read(self, payload: bytes) -> Chunk:
        """The chunk of one message; raises ProtocolError where it is damaged or does not join what came before."""
        chunk = chunk_from_pb(parse_answer(inference_pb2.GenerateResponse, payload))
        self._session.joiner.join(chunk)
        return chunk

    def end(self, receipt: bytes | None) -> None:
        """Takes the receipt; raises ProtocolError where it is damaged or a choice has no finish reason."""
        self._session.joiner.end()
        if receipt is not None:
            found = receipt_from_pb(parse_answer(common_pb2.Receipt, receipt))
            request_id = RequestId(self._request.message.request_id) or found.request_id
            self.receipt = replace(found, request_id=request_id, attempts=found.attempts + self._session.tries - 1)

    def lost(self, error: TandemError) -> float | None:
        """The stream is lost: seconds until the next one is to be opened; None where all had come, and only the receipt is missing.

        Raises `error`, or DeadlineError, where the request ends with it.
        """
        if self._session.joiner.is_finished:
            return None
        pause_s = self._session.lost(error)
        remaining_s = self.timeout_s()
        return pause_s if remaining_s is None else min(pause_s, remaining_s)
