"""`python -m router`."""

import os


def run() -> int:
    """Runs the router. gRPC's C core reads its log level when it is imported, and would report a taken port before our own line."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from router.main import main

    return main()


if __name__ == "__main__":
    raise SystemExit(run())
