"""The half of a token stream that both clients share: bytes in, checked chunks out. Does no I/O."""

from tandem.convert import chunk_from_pb, receipt_from_pb
from tandem.domain import Chunk, Receipt
from tandem.generate_request import PreparedRequest
from tandem.rpc import parse_answer
from tandem.session import StreamJoiner
from tandem.v1 import common_pb2, inference_pb2

GENERATE = "tandem.v1.Inference/Generate"
LIST_MODELS = "tandem.v1.Inference/ListModels"
GET_STATUS = "tandem.v1.Control/GetStatus"
SET_TARGET = "tandem.v1.Control/SetTarget"
DRAIN_REPLICA = "tandem.v1.Control/DrainReplica"
# A whole generation on a busy cluster, and a question to a router that is well.
DEFAULT_TIMEOUT_S = 600.0
QUERY_TIMEOUT_S = 10.0


class ChunkReader:
    """Parses and joins the messages of one stream; `receipt` is None until its end."""

    def __init__(self, request: PreparedRequest) -> None:
        self._joiner = StreamJoiner(first_position=request.first_position, num_choices=request.num_choices)
        self.receipt: Receipt | None = None

    def read(self, payload: bytes) -> Chunk:
        """The chunk of one message; raises ProtocolError where it is damaged or does not join what came before."""
        chunk = chunk_from_pb(parse_answer(inference_pb2.GenerateResponse, payload))
        self._joiner.join(chunk)
        return chunk

    def end(self, receipt: bytes | None) -> None:
        """Takes the receipt; raises ProtocolError where it is damaged or a choice has no finish reason."""
        self._joiner.end()
        if receipt is not None:
            self.receipt = receipt_from_pb(parse_answer(common_pb2.Receipt, receipt))
