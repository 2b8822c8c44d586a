"""The environment that an engine's process needs before torch and vLLM are imported."""

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

from tandem.errors import ConfigError, Reason

_DEFAULTS = {
    # One thread per engine: two, and anything else on the cores, give 184 ms between tokens (reference: vllm, section 8).
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on CPU: no worker process of its own beside the engine's
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "SPT_NOENV": "1",  # vLLM renames its processes, and their environment must stay: by it they are found
}
# vLLM compiles one small function at the first request for logprobs: 7 s in the engine's step, for 5 ms less (measured on two cores).
_CPU_DEFAULTS = {"TORCH_COMPILE_DISABLE": "1"}


def set_engine_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what is not set yet. The engine's block hashes start from PYTHONHASHSEED: unset is the value that all processes share."""
    for name, value in (_DEFAULTS | ({} if has_cuda() else _CPU_DEFAULTS)).items():
        environment.setdefault(name, value)
    environment.pop("PYTHONHASHSEED", None)


def has_cuda() -> bool:
    """Whether this machine has an NVIDIA GPU; asked without importing torch, which a fork would not survive."""
    return Path("/dev/nvidia0").exists()


def require_vllm() -> None:
    """Raises ConfigError saying what to install where vLLM is not there. Imports nothing."""
    try:
        is_there = importlib.util.find_spec("vllm") is not None
    except ModuleNotFoundError:
        is_there = False
    if not is_there:
        message = "vLLM is not installed: pip install --no-deps -r requirements/cpu.txt (or cuda.txt)"
        raise ConfigError(message, reason=Reason.MISSING_PACKAGE)
