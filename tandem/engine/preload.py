"""Imports all that a vLLM replica on CPU needs, so that a fork of this process imports nothing. Imports only.

A thread or a torch operation would forbid the fork.
"""

import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.executor.uniproc_executor
import vllm.v1.worker.cpu_worker

import tandem.engine.vllm_engine

MODULES = (
    vllm.model_executor.models.llama,
    vllm.v1.engine.core,
    vllm.v1.executor.uniproc_executor,
    vllm.v1.worker.cpu_worker,
    tandem.engine.vllm_engine,
)
