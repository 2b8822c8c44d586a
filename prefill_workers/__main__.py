"""`python -m prefill_workers`: a replica whose role is prefill."""

from tandem.domain import Role
from tandem.replica_main import main

if __name__ == "__main__":
    main(Role.PREFILL)
