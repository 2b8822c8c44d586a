"""Imports all that a vLLM replica on CPU needs, so that a fork of this process imports nothing.

A thread or a torch operation would forbid the fork.
"""

import setproctitle
import vllm.distributed.elastic_ep.elastic_execute
import vllm.model_executor.layers.quantization.compressed_tensors.utils
import vllm.model_executor.layers.quantization.online.base
import vllm.model_executor.models.llama
import vllm.plugins.lora_resolvers.filesystem_resolver
import vllm.plugins.lora_resolvers.hf_hub_resolver
import vllm.renderers.hf
import vllm.v1.attention.backends.cpu_attn
import vllm.v1.core.sched.scheduler
import vllm.v1.engine.core
import vllm.v1.executor.uniproc_executor
import vllm.v1.pool.flash_maxsim
import vllm.v1.worker.cpu_worker
from vllm.platforms import current_platform

import tandem.engine.vllm_engine

# What an engine has in sys.modules once it serves and a process that has imported vLLM has not, by the module that brings it.
MODULES = (
    setproctitle,
    vllm.distributed.elastic_ep.elastic_execute,
    vllm.model_executor.layers.quantization.compressed_tensors.utils,
    vllm.model_executor.layers.quantization.online.base,
    vllm.model_executor.models.llama,
    vllm.plugins.lora_resolvers.filesystem_resolver,
    vllm.plugins.lora_resolvers.hf_hub_resolver,
    vllm.renderers.hf,
    vllm.v1.attention.backends.cpu_attn,
    vllm.v1.core.sched.scheduler,
    vllm.v1.engine.core,
    vllm.v1.executor.uniproc_executor,
    vllm.v1.pool.flash_maxsim,
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
