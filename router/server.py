"""The router's gRPC services: Inference, Router and Control.

Must not route or count by itself: calls go through the shell. Errors leave as TandemError; `rpc.py` puts them on the wire.
"""

import asyncio
from collections.abc import Callable, Mapping

import grpc

from router.access import Access
from router.frontend import Frontend
from router.openai_response import CHAT, COMPLETION
from router.placement import Assignment, Placement
from router.plan import planned
from router.receipts import waiting_terms
from router.register_view import RegisterView
from router.scores import Scores
from router.shell import RouterShell
from router.workers import Workers
from tandem.convert import lease_to_pb, load_to_pb, receipt_to_pb, role_from_pb, role_to_pb
from tandem.domain import Lease, ModelId, PlannedWorker, ReplicaId, ReplicaTarget, Request, Role
from tandem.errors import CancelledRequestError, InvalidRequestError, NotBuiltError, NotFoundError, PreconditionError, Reason
from tandem.explanation import Candidate, Explanation, Part, explanation_to_pb
from tandem.membership import MemberKind
from tandem.rpc import ServerCall, service
from tandem.rpc import call as rpc_call
from tandem.v1 import common_pb2, control_pb2, inference_pb2, router_pb2, worker_pb2

_DRAIN_S = 5.0
_MAX_EXPIRY_S = 366 * 86_400.0


class _GrpcCall:
    """A gRPC call as the frontend sees it. `routers` says where the client may go on when this one is lost."""

    def __init__(self, call: ServerCall, tenant: str, routers: Callable[[], str], stall_s: float) -> None:
        self.tenant = tenant
        self.time_remaining_s = call.time_remaining_s
        self._write = call.write
        self._stall_s = stall_s
        self._tell_routers = call.tell_routers
        self._routers = routers

    async def accept(self, request: Request, lease: Lease) -> None:
        """Tells the client of the routers."""
        await self._tell_routers(self._routers())

    async def write(self, payload: bytes, /) -> None:
        """Raises CancelledRequestError where the client has gone, or reads nothing for `stall_s`: what it has not read is bounded."""
        try:
            async with asyncio.timeout(self._stall_s):
                await self._write(payload)
        except TimeoutError as error:
            words = f"the client has read nothing for {self._stall_s:g} s"
            raise CancelledRequestError(words, reason=Reason.CLIENT_STALLED) from error


class InferenceService:
    """What clients call, with a key where `access` asks for one."""

    def __init__(self, shell: RouterShell, frontend: Frontend, view: RegisterView | None, access: Access) -> None:
        self._shell = shell
        self._access = access
        self._frontend = frontend
        self._view = view

    async def generate(self, message: inference_pb2.GenerateRequest, call: ServerCall) -> None:
        """Streams one request's tokens; its receipt goes into the trailing metadata. Raises TandemError."""
        tenant = self._access.tenant(call.metadata)
        call.set_receipt(
            receipt_to_pb(await self._frontend.generate(message, _GrpcCall(call, tenant, self._routers, self._shell.config.client_stall_s)))
        )

    def _routers(self) -> str:
        """Addresses of all routers with a lease."""
        return "" if self._view is None else ",".join(member.address for member in self._view.of(MemberKind.ROUTER) if member.address)

    async def list_models(self, message: inference_pb2.ListModelsRequest, call: ServerCall) -> inference_pb2.ListModelsResponse:
        """Models that are or were served, with how many replicas are ready now."""
        self._access.tenant(call.metadata)
        fleet = self._shell.core.fleet
        models = []
        for model in fleet.models:
            card = inference_pb2.Model(
                id=model, prefill_replicas=len(fleet.ready(model, Role.PREFILL)), decode_replicas=len(fleet.ready(model, Role.DECODE))
            )
            lease = fleet.last_lease(model)
            if lease is not None:  # else no replica of it has been started yet
                card.context_tokens, card.block_size_tokens = lease.engine.context_tokens, lease.engine.block_size_tokens
                card.namespace, card.engine = lease.namespace, lease.engine.engine
            models.append(card)
        return inference_pb2.ListModelsResponse(models=models)


class RouterService:
    """What lookaside clients and operators ask. Of that only Explain is served yet."""

    def __init__(self, shell: RouterShell) -> None:
        self._shell = shell

    async def route(self, message: router_pb2.RouteRequest, call: ServerCall) -> router_pb2.RouteResponse:
        """Raises NotBuiltError."""
        raise NotBuiltError("Router.Route")

    async def report_outcome(self, message: router_pb2.ReportOutcomeRequest, call: ServerCall) -> router_pb2.ReportOutcomeResponse:
        """Raises NotBuiltError."""
        raise NotBuiltError("Router.ReportOutcome")

    async def explain(self, message: router_pb2.ExplainRequest, call: ServerCall) -> router_pb2.ExplainResponse:
        """Why a request of late went where it went, by any id that its caller saw; the answer has the router's own.

        Raises NotFoundError where this router does not remember it.
        """
        decisions, seen_id = self._shell.core.decisions, message.request_id
        bare_id = seen_id.removeprefix(CHAT.id_prefix).removeprefix(COMPLETION.id_prefix)  # an HTTP answer's "id"
        remembered = decisions.find(seen_id) or decisions.find(bare_id)
        if remembered is None:
            raise NotFoundError(
                f"no request {seen_id[:200]!r} is among the last {decisions.max_requests} of this router",
                reason=Reason.UNKNOWN_REQUEST,
                field="request_id",
            )
        request_id, decision = remembered
        assignment, placement, failure = decision.assignment, decision.placement, decision.failure
        found = Explanation(
            request_id=request_id,
            state=decision.state,
            reason="" if failure is None else failure.reason,
            message="" if failure is None else failure.message,
            plan=decision.plan,
            candidates=(*_prompt_candidates(assignment), *_decode_candidates(placement)),
            receipt=decision.receipt,
            predicted=() if assignment is None or decision.plan is not None else waiting_terms(assignment),
        )
        return explanation_to_pb(found)


def _prompt_candidates(assignment: Assignment | None) -> list[Candidate]:
    if assignment is None:
        return []
    return [
        Candidate(
            worker=planned(one.lease),
            part=Part.BOTH if one.is_one_worker else Part.PREFILL,
            is_chosen=one.lease == assignment.worker and one.is_one_worker == (not assignment.prefill),
            terms=one.terms(),
        )
        for one in assignment.considered
    ]


def _decode_candidates(placement: Placement | None) -> list[Candidate]:
    if placement is None:
        return []
    return [
        Candidate(worker=planned(one.lease), part=Part.DECODE, is_chosen=one.lease == placement.decode, terms=one.terms())
        for one in sorted(placement.considered, key=lambda one: one.rank)
    ]


class ControlService:
    """What the command line asks. `view` is None where the router has no register.

    Whoever reaches the router may read the status, as /metrics and /sd; only operators may change something.
    """

    def __init__(self, shell: RouterShell, workers: Workers, view: RegisterView | None, access: Access | None = None) -> None:
        self._shell = shell
        self._access = access or Access((), shell.metrics)
        self._workers = workers
        self._view = view

    async def get_status(self, message: control_pb2.GetStatusRequest, call: ServerCall) -> control_pb2.GetStatusResponse:
        """Every replica this router knows, by id, and its own queue."""
        core, config = self._shell.core, self._shell.config
        stragglers = {one.replica_id for one in core.predictor.pools.stragglers()}
        replicas = [
            control_pb2.ReplicaStatus(
                lease=lease_to_pb(status.lease),
                load=load_to_pb(status.load),
                is_reachable=True,
                predicted_work_s=status.predicted_work_s,
                is_straggler=status.lease.replica_id in stragglers,
            )
            for status in core.replicas(self._shell.clock())
        ]
        replicas += [control_pb2.ReplicaStatus(lease=lease_to_pb(lease)) for lease in self._workers.unreachable()]
        replicas.sort(key=lambda replica: replica.lease.replica_id)
        return control_pb2.GetStatusResponse(
            cluster=config.cluster,
            router_id=config.router_id,
            replicas=replicas,
            queued_requests=self._shell.queued_requests,
            running_requests=core.running_requests,
            targets=[] if self._view is None else [_target_to_pb(target) for target in self._view.snapshot.targets],
            queues=[
                control_pb2.ModelQueue(
                    model=model,
                    queued_requests=demand.queued_requests,
                    queued_work_s=demand.queued_work_s,
                    requests_total=demand.requests_total,
                )
                for model, demand in self._shell.demand().items()
            ],
            predictions=_predictions_to_pb(core.predictor.scores),
        )

    async def set_target(self, message: control_pb2.SetTargetRequest, call: ServerCall) -> control_pb2.SetTargetResponse:
        """Sets replica counts by hand. Raises NotFoundError for a model that is not configured, InvalidRequestError."""
        self._access.check_operator(call.metadata)
        view = self._required_view()
        models = self._shell.core.fleet.models
        targets = []
        for target in message.targets:
            if not target.model and len(models) > 1:
                raise InvalidRequestError("targets.model", f"must name one of: {', '.join(models)}")
            if not target.model and models:
                target.model = models[0]
            if target.model not in models:
                names = ", ".join(models) or "none yet"
                raise NotFoundError(
                    f"model {target.model!r} is not served; served are: {names}", reason=Reason.UNKNOWN_MODEL, field="model"
                )
            targets.append(_target_from_pb(target))
        if not targets:
            raise InvalidRequestError("targets", "must not be empty")
        await view.register.set_manual_targets(targets)
        return control_pb2.SetTargetResponse()

    async def drain_replica(self, message: control_pb2.DrainReplicaRequest, call: ServerCall) -> control_pb2.DrainReplicaResponse:
        """Has a replica take nothing new. Raises NotFoundError for one that this router does not reach."""
        self._access.check_operator(call.metadata)
        lease = self._shell.core.fleet.get(ReplicaId(message.replica_id))
        if lease is None:
            known = ", ".join(lease.replica_id for lease in self._shell.core.fleet.leases) or "none"
            raise NotFoundError(f"replica {message.replica_id!r} is not known; known are: {known}", reason=Reason.UNKNOWN_REPLICA)
        worker = PlannedWorker(replica_id=lease.replica_id, incarnation=lease.incarnation, address=lease.address)
        request = worker_pb2.DrainRequest(deadline_remaining_s=message.deadline_remaining_s)
        await rpc_call(self._workers.channel(worker), "tandem.v1.Worker/Drain", request, worker_pb2.DrainResponse, timeout_s=_DRAIN_S)
        return control_pb2.DrainReplicaResponse()

    def _required_view(self) -> RegisterView:
        if self._view is None:
            raise PreconditionError("this router has no register: replicas are not scaled", reason=Reason.NO_REGISTER)
        return self._view


def _predictions_to_pb(scores: Scores) -> list[control_pb2.ModelPredictions]:
    """By model; trust first, since a model without outcomes has no scores."""
    found = {one.model: control_pb2.ModelPredictions(model=one.model, is_trusted=one.is_trusted) for one in scores.trust()}
    for score in scores.scores():
        of_model = found.setdefault(score.model, control_pb2.ModelPredictions(model=score.model, is_trusted=True))
        of_model.scores.append(
            control_pb2.PredictionScore(
                kind=score.kind,
                outcomes_total=score.outcomes_total,
                window_outcomes=score.window_outcomes,
                predicted_p50=score.predicted_p50,
                actual_p50=score.actual_p50,
                mean_error_fraction=score.mape,
                q90_coverage_fraction=score.q90_coverage,
            )
        )
    return [found[model] for model in sorted(found)]


def _target_to_pb(target: ReplicaTarget) -> control_pb2.Target:
    return control_pb2.Target(model=target.model, role=role_to_pb(target.role), replicas=target.replicas, expires_in_s=target.expires_in_s)


def _target_from_pb(message: control_pb2.Target) -> ReplicaTarget:
    if not 0 <= message.expires_in_s < _MAX_EXPIRY_S:
        raise InvalidRequestError("targets.expires_in_s", f"must be from 0 to {_MAX_EXPIRY_S:.0f}, got {message.expires_in_s}")
    if message.role == common_pb2.ROLE_UNSPECIFIED:
        raise InvalidRequestError("targets.role", "must be prefill or decode")
    replicas = -1 if message.is_cleared else message.replicas
    return ReplicaTarget(
        model=ModelId(message.model), role=role_from_pb(message.role), replicas=replicas, expires_in_s=message.expires_in_s
    )


def services(
    shell: RouterShell, workers: Workers, frontend: Frontend, view: RegisterView | None, access: Access | None = None
) -> "Mapping[str, grpc.GenericRpcHandler[bytes, bytes]]":
    """All services by full name, for `start_server`; without `access` no key is asked for."""
    access = access or Access((), shell.metrics)
    return {
        "tandem.v1.Inference": service(inference_pb2, "Inference", InferenceService(shell, frontend, view, access)),
        "tandem.v1.Router": service(router_pb2, "Router", RouterService(shell)),
        "tandem.v1.Control": service(control_pb2, "Control", ControlService(shell, workers, view, access)),
    }
