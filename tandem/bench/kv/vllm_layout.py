"""`python -m tandem.bench.kv.vllm_layout`: the engine layout on the KV tensors of a real vLLM engine that serves the bundled model.

Reads {"folder", "repetitions", "seed"} as JSON from stdin, writes one row of the report as JSON to stdout.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Starts an engine in this process, borrows its tensors, measures."""
    job = json.load(sys.stdin)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    from vllm import LLM

    from kv_transfer.kv_tensors import KvTensors
    from tandem.bench.kv.engine_layout import layout_row, measure_layout
    from tandem.engine.model_files import resolve_model

    engine = LLM(model=str(resolve_model("bundled")), dtype="float32", block_size=32, kv_cache_memory_bytes=128 << 20, enforce_eager=True)
    caches = engine.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches
    tensors = KvTensors({f"layers.{number}": cache for number, cache in enumerate(caches)})
    rows, _ = tensors.to_save([])
    measured = measure_layout(rows, Path(job["folder"]), repetitions=job["repetitions"], seed=job["seed"])
    print(json.dumps(layout_row(rows, measured, "vllm")), flush=True)


if __name__ == "__main__":
    main()
