"""`python -m autoscaler`."""

import os

if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from autoscaler.main import main

    raise SystemExit(main())
