"""`python -m kv_transfer`: one node's KV store service."""

import sys

from kv_transfer.main import main

if __name__ == "__main__":
    sys.exit(main())
