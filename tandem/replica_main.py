"""`python -m prefill_workers` and `python -m decode_workers`: one replica in a process of its own, without a zygote."""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path

from tandem.cluster_config import read_toml
from tandem.config import EngineConfig, ReplicaConfig, replica_config_from_json
from tandem.domain import Role
from tandem.engine.environment import set_engine_environment
from tandem.errors import ConfigError
from tandem.membership import REGISTER_URL


def main(role: Role) -> None:
    """Parses the command line, runs the replica, exits with 0 or, with one line on stderr, 2."""
    parser = argparse.ArgumentParser(prog=f"python -m {role}_workers", description=f"One {role} replica: vLLM behind gRPC.")
    parser.add_argument("--model", default="bundled", help="local folder, hub name, or 'bundled'")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--metrics-port", type=int, default=0, help="0: any free port")
    parser.add_argument("--replica-id", default=f"{role}-{os.getpid()}")
    parser.add_argument("--store-dir", default="/dev/shm/tandem", help="folder of KV blocks that all replicas of the node share")
    parser.add_argument("--no-kv-transfer", action="store_true", help="plain engine: neither loads nor publishes KV blocks")
    for name in ("kv_cache_bytes", "store_capacity_bytes", "max_num_seqs", "max_num_batched_tokens", "context_tokens"):
        default = next(field.default for field in fields(EngineConfig) if field.name == name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", default="vllm", help="vllm, or simulated: steps take the time that a profile says")
    parser.add_argument("--step-profile", type=Path, help="TOML file of a simulated engine's profile (tandem/engine/README.md)")
    parser.add_argument("--slowdown", type=float, help="multiplies the simulated engine's step times")
    parser.add_argument("--faults", default="", help="fault hooks, for tests")
    parser.add_argument("--config-json", help="a whole ReplicaConfig; replaces all other options")
    parser.add_argument("--lifeline-fd", type=int, help="reports go here, and its end stops the replica")
    args = parser.parse_args()
    try:
        step_profile = _step_profile(args.step_profile, args.slowdown)
    except ConfigError as error:
        parser.error(error.message)
    set_engine_environment()

    from tandem.engine.model_files import served_name
    from tandem.replica import main_with_errors

    if args.config_json:
        whole = replica_config_from_json(args.config_json)
        sys.exit(main_with_errors(replace(whole, redis_url=os.environ.get(REGISTER_URL, "")), args.lifeline_fd))
    with tempfile.TemporaryDirectory(prefix="tandem-") as runtime_dir:
        config = ReplicaConfig(
            replica_id=args.replica_id,
            role=role,
            incarnation=time.time_ns(),
            served_model=served_name(args.model),
            host=args.host,
            port=args.port,
            metrics_port=args.metrics_port,
            runtime_dir=str(Path(runtime_dir)),
            engine=EngineConfig(
                engine=args.engine,
                step_profile=step_profile,
                model=args.model,
                dtype=args.dtype,
                context_tokens=args.context_tokens,
                kv_cache_bytes=args.kv_cache_bytes,
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                seed=time.time_ns() % 2**31,
                is_kv_transfer_on=not args.no_kv_transfer,
                store_dir=args.store_dir,
                store_capacity_bytes=args.store_capacity_bytes,
                faults=args.faults,
            ),
        )
        sys.exit(main_with_errors(config, args.lifeline_fd))


def _step_profile(path: Path | None, slowdown: float | None) -> dict[str, object]:
    """Of the file, and the slowdown on top. Raises ConfigError."""
    profile: dict[str, object] = {} if path is None else read_toml(path)
    return profile if slowdown is None else {**profile, "slowdown": slowdown}
