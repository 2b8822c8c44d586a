"""What code this is: nodes that work on one request must run the same.

Must not import what it reads.
"""

import hashlib
from functools import cache
from pathlib import Path

_PACKAGES = ("autoscaler", "decode_workers", "kv_transfer", "prefill_workers", "router", "tandem")


@cache
def code_fingerprint() -> str:
    """12 hex digits over every Python file of ours as it is installed, names and bytes. Reads about 1 MB."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
