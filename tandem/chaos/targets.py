"""Which processes a fault is for: only ever the platform's that this run has started, found by its cluster id. Must not signal anybody."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.chaos.schedule import Action, PlannedFault, Row
from tandem.cleanup import ClusterProcess, processes_of
from tandem.domain import Role
from tandem.membership import Member, MemberKind

# Rows whose part is one process of a kind, or any one of several.
_KINDS = {
    Row.STORE: "store",
    Row.REDIS: "redis",
    Row.AUTOSCALER: "autoscaler",
    Row.ACTOR: "actor",
    Row.ZYGOTE: "zygote",
    Row.NODE_AGENT: "node_agent",
}
_ROLES = {Row.PREFILL: Role.PREFILL, Row.DECODE: Role.DECODE, Row.PREFILL_POOL: Role.PREFILL, Row.DECODE_POOL: Role.DECODE}
_POOLS = (Row.PREFILL_POOL, Row.DECODE_POOL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A process to be broken, and what to call it."""

    pid: int
    name: str


def find_victims(cluster: str, fault: PlannedFault, members: Sequence[Member]) -> list[Victim]:
    """The processes that the fault is for, by the register's `members` and /proc; empty where there are none."""
    processes = processes_of(cluster)
    if fault.row in _ROLES:
        replicas = {member.member_id: member.pid for member in members if member.kind is MemberKind.REPLICA}
        mine = [member.member_id for member in members if member.kind is MemberKind.REPLICA and member.role == _ROLES[fault.row]]
        chosen = mine if fault.row in _POOLS else [fault.choose(mine)]
        victims = [Victim(pid=replicas[name], name=name) for name in chosen if name is not None]
        cores = [Victim(pid=pid, name=f"{one.name} core") for one in victims for pid in cores_of(processes, one.pid)]
        if fault.action in (Action.KILL_CORE, Action.STOP_CORE):
            return cores
        return [*victims, *cores] if fault.action is Action.SLOW else victims
    if fault.row is Row.ROUTER:
        routers = {member.member_id: member.pid for member in members if member.kind is MemberKind.ROUTER}
        name = fault.choose(list(routers))
        return [] if name is None else [Victim(pid=routers[name], name=name)]
    kind = {Action.KILL_GCS: "gcs", Action.KILL_RAYLET: "raylet"}.get(fault.action) or _KINDS[fault.row]
    pid = fault.choose([f"{process.pid:010d}" for process in processes if process.kind == kind])
    return [] if pid is None else [Victim(pid=int(pid), name=kind)]


def cores_of(processes: Sequence[ClusterProcess], replica_pid: int) -> list[int]:
    """The engine processes of a replica."""
    return [process.pid for process in processes if process.kind == "engine_core" and parent_of(process.pid) == replica_pid]


def parent_of(pid: int) -> int | None:
    """The parent's pid; None where the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
