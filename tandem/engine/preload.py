"""Imports all that a vLLM replica on CPU needs, so that a fork of this process imports nothing.

A thread or a torch operation would forbid the fork.
"""

import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.executor.uniproc_executor
import vllm.v1.worker.cpu_worker
from vllm.platforms import current_platform

import tandem.engine.vllm_engine

MODULES = (
    vllm.model_executor.models.llama,
    vllm.v1.engine.core,
    vllm.v1.executor.uniproc_executor,
    vllm.v1.worker.cpu_worker,
    tandem.engine.vllm_engine,
)


def register_kernels() -> None:
    """Has vLLM put its CPU kernels into all modules here, once, rather than in each engine.

    It looks at every value of every module. In a forked engine that writes to most pages of the heap (each look counts a reference), which
    are the engine's own from then on.
    """
    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
