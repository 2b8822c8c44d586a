"""`python -m tandem.trials`: promises on live clusters of their own, real engines and simulated ones; prints and writes what came of it."""

import argparse
import asyncio
import json
import os
from pathlib import Path

from tandem.trials.continuation import continuation_trials
from tandem.trials.overload import overload_trials
from tandem.trials.prediction import prediction_trials
from tandem.trials.tenancy import tenant_trials

_TRIALS = ("continuation", "prediction", "tenants", "overload")


async def _run(names: list[str], requests: int, warmup: int, rate_rps: float) -> dict[str, object]:
    report: dict[str, object] = {"schema": "tandem.trials/1"}
    for name in names:
        match name:
            case "continuation":
                report[name] = await continuation_trials()
            case "prediction":
                report[name] = await prediction_trials(requests, warmup, rate_rps)
            case "tenants":
                report[name] = await tenant_trials()
            case _:
                report[name] = await overload_trials()
        print(json.dumps(report[name], indent=1), flush=True)
    return report


def main() -> None:
    """Reads the command line, runs, writes."""
    parser = argparse.ArgumentParser(prog="python -m tandem.trials", description="Live trials of the router on clusters of their own.")
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=f"of {', '.join(_TRIALS)}; default: all")
    parser.add_argument("--json", type=Path, default=Path("build/trials.json"))
    parser.add_argument("--requests", type=int, default=2000, help="of the prediction trial, after the warm-up")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second of the prediction trial")
    args = parser.parse_args()
    if unknown := sorted(set(args.trials) - set(_TRIALS)):
        parser.error(f"no trial named {unknown[0]!r}; there are {', '.join(_TRIALS)}")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    report = asyncio.run(_run(args.trials or list(_TRIALS), args.requests, args.warmup, args.rate))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"report: {args.json}")


if __name__ == "__main__":
    main()
