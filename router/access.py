"""Who calls: the tenant of a call's key, at both edges, and a count of the calls that had none.

Must not look at anything of a call but its Authorization header, or keep or log that.
"""

from collections.abc import Mapping, Sequence

from tandem.errors import AuthenticationError, PermissionDeniedError
from tandem.telemetry import RouterMetrics
from tandem.tenancy import KeyRing, Tenant

AUTHORIZATION = "authorization"  # of gRPC metadata; HTTP's headers do not care about case


class Access:
    """One router's door. Without tenants it is open, and everybody is the default one."""

    def __init__(self, tenants: Sequence[Tenant], metrics: RouterMetrics) -> None:
        self._ring = KeyRing(tenants)
        self._metrics = metrics

    def tenant(self, headers: Mapping[str, str]) -> str:
        """The caller's tenant. Raises AuthenticationError."""
        return self._owner(headers).name

    def check_operator(self, headers: Mapping[str, str]) -> None:
        """Raises AuthenticationError, and PermissionDeniedError where the caller may not change the cluster."""
        owner = self._owner(headers)
        if not owner.is_operator:
            raise PermissionDeniedError(f"tenant {owner.name!r} is no operator: is_operator is not set for it")

    def _owner(self, headers: Mapping[str, str]) -> Tenant:
        try:
            return self._ring.owner(headers.get(AUTHORIZATION))
        except AuthenticationError:
            self._metrics.unauthenticated.inc()
            raise
