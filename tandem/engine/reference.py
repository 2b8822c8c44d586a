"""One plain vLLM engine, offline: the tokens that the platform must reproduce. No connector, no router, none of our streaming.

Reads {"model", "dtype", "block_size_tokens", "requests": [{"token_ids", "max_tokens"}]} as JSON from stdin, writes a list of token id
lists to stdout.
"""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    """Runs all requests greedily, in one batch."""
    job = json.load(sys.stdin)
    engine = LLM(
        model=job["model"],
        dtype=job["dtype"],
        block_size=job["block_size_tokens"],
        kv_cache_memory_bytes=128 << 20,
        enforce_eager=True,
        enable_prefix_caching=False,
        generation_config="vllm",
        disable_log_stats=True,
    )
    prompts = [{"prompt_token_ids": request["token_ids"]} for request in job["requests"]]
    params = [SamplingParams(temperature=0.0, max_tokens=request["max_tokens"]) for request in job["requests"]]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    print("tokens " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


if __name__ == "__main__":
    main()
