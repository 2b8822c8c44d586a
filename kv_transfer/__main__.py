"""`python -m kv_transfer`: one node's KV store service."""

import os
import sys

if __name__ == "__main__":
    # gRPC's own log lines are not for users; ours say what went wrong. It reads this when it is first imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    from kv_transfer.main import main

    sys.exit(main())
