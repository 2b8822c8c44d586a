"""`python -m decode_workers`: a replica whose role is decode."""

from tandem.domain import Role
from tandem.replica_main import main

if __name__ == "__main__":
    main(Role.DECODE)
