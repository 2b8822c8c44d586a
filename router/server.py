"""The router's gRPC services: Inference, Router and Control.

Must not route or count by itself: calls go through the shell. Errors leave as TandemError; `rpc.py` puts them on the wire.
"""

import asyncio
from collections.abc import Mapping

import grpc

from router.relay import Relay
from router.request_reader import hash_prompt, read_request
from router.shell import RouterShell
from router.tokenizer import Tokenizers
from router.workers import Workers
from tandem.convert import lease_to_pb, load_to_pb, receipt_to_pb
from tandem.deadline import Deadline
from tandem.domain import ModelId, Receipt, Role
from tandem.errors import NotBuiltError, Reason, TandemError
from tandem.rpc import ServerCall, service
from tandem.v1 import control_pb2, inference_pb2, router_pb2

_UNKNOWN_MODEL = "unknown"  # a label must not be what a client made up


class InferenceService:
    """What clients call."""

    def __init__(self, shell: RouterShell, workers: Workers, tokenizers: Tokenizers) -> None:
        self._shell = shell
        self._workers = workers
        self._tokenizers = tokenizers

    async def generate(self, message: inference_pb2.GenerateRequest, call: ServerCall) -> None:
        """Streams one request's tokens; its receipt goes into the trailing metadata. Raises TandemError."""
        arrived_s = self._shell.clock()
        deadline = Deadline(call.time_remaining_s())
        model, outcome, relay = _UNKNOWN_MODEL, str(Reason.BUG), None
        metrics = self._shell.metrics
        try:
            with self._shell.call():
                deadline.remaining_s("arrival")
                lease = await self._shell.lease_for(message.model, deadline)
                model = lease.model
                request = await read_request(message, lease, self._tokenizers)
                block_hashes = await hash_prompt(request, lease.engine.block_size_tokens)
                metrics.prompt_tokens.labels(model).inc(len(request.prompt_token_ids))
                relay = Relay(self._shell, self._workers, call, request, lease.engine, arrived_s=arrived_s)
                receipt = await relay.run(block_hashes, deadline)
            call.set_receipt(receipt_to_pb(receipt))
            self._observe(lease.model, receipt)
            outcome = "ok"
        except TandemError as error:
            outcome = error.reason
            raise
        except asyncio.CancelledError:
            outcome = Reason.CLIENT_CANCELLED
            raise
        finally:
            metrics.requests.labels(model, outcome).inc()
            if relay is not None:
                metrics.output_tokens.labels(model).inc(relay.sent_tokens)

    async def list_models(self, message: inference_pb2.ListModelsRequest, call: ServerCall) -> inference_pb2.ListModelsResponse:
        """Models that are or were served, with how many replicas are ready now."""
        fleet = self._shell.core.fleet
        models = []
        for model in fleet.models:
            lease = fleet.lease_for(model)
            models.append(
                inference_pb2.Model(
                    id=model,
                    context_tokens=lease.engine.context_tokens,
                    block_size_tokens=lease.engine.block_size_tokens,
                    prefill_replicas=len(fleet.ready(model, Role.PREFILL)),
                    decode_replicas=len(fleet.ready(model, Role.DECODE)),
                    namespace=lease.namespace,
                )
            )
        return inference_pb2.ListModelsResponse(models=models)

    def _observe(self, model: ModelId, receipt: Receipt) -> None:
        metrics = self._shell.metrics
        metrics.queue.labels(model).observe(receipt.queue_s)
        metrics.ttft.labels(model).observe(receipt.ttft_s)
        metrics.e2e.labels(model).observe(receipt.e2e_s)
        for term in receipt.predicted:
            if term.name == "ttft_s" and term.actual is not None:
                metrics.ttft_error.labels(model).observe(abs(term.predicted - term.actual))


class RouterService:
    """What lookaside clients ask. On the wire, not served yet."""

    async def route(self, message: router_pb2.RouteRequest, call: ServerCall) -> router_pb2.RouteResponse:
        """Raises NotBuiltError."""
        raise NotBuiltError("Router.Route")

    async def report_outcome(self, message: router_pb2.ReportOutcomeRequest, call: ServerCall) -> router_pb2.ReportOutcomeResponse:
        """Raises NotBuiltError."""
        raise NotBuiltError("Router.ReportOutcome")

    async def explain(self, message: router_pb2.ExplainRequest, call: ServerCall) -> router_pb2.ExplainResponse:
        """Raises NotBuiltError."""
        raise NotBuiltError("Router.Explain")


class ControlService:
    """What the command line asks."""

    def __init__(self, shell: RouterShell, workers: Workers) -> None:
        self._shell = shell
        self._workers = workers

    async def get_status(self, message: control_pb2.GetStatusRequest, call: ServerCall) -> control_pb2.GetStatusResponse:
        """Every replica this router knows, by id, and its own queue."""
        core, config = self._shell.core, self._shell.config
        replicas = [
            control_pb2.ReplicaStatus(
                lease=lease_to_pb(status.lease),
                load=load_to_pb(status.load),
                is_reachable=True,
                predicted_work_s=status.predicted_work_s,
            )
            for status in core.replicas()
        ]
        replicas += [control_pb2.ReplicaStatus(lease=lease_to_pb(lease)) for lease in self._workers.unreachable()]
        replicas.sort(key=lambda replica: replica.lease.replica_id)
        return control_pb2.GetStatusResponse(
            cluster=config.cluster,
            router_id=config.router_id,
            replicas=replicas,
            queued_requests=core.queued_requests,
            running_requests=core.running_requests,
        )

    async def set_target(self, message: control_pb2.SetTargetRequest, call: ServerCall) -> control_pb2.SetTargetResponse:
        """Raises NotBuiltError."""
        raise NotBuiltError("Control.SetTarget")

    async def drain_replica(self, message: control_pb2.DrainReplicaRequest, call: ServerCall) -> control_pb2.DrainReplicaResponse:
        """Raises NotBuiltError."""
        raise NotBuiltError("Control.DrainReplica")


def services(shell: RouterShell, workers: Workers, tokenizers: Tokenizers) -> "Mapping[str, grpc.GenericRpcHandler[bytes, bytes]]":
    """All services by full name, for `start_server`."""
    return {
        "tandem.v1.Inference": service(inference_pb2, "Inference", InferenceService(shell, workers, tokenizers)),
        "tandem.v1.Router": service(router_pb2, "Router", RouterService()),
        "tandem.v1.Control": service(control_pb2, "Control", ControlService(shell, workers)),
    }
