"""Ends the process groups of an engine that is alone in them.

vLLM makes a dozen of gloo groups, and each has a thread that wakes 115 times a second: 1,500 wake-ups a second where nothing runs.
With one rank no collective ever runs.
"""

import torch.distributed
from vllm.distributed import parallel_state


def quiet_process_groups() -> int:
    """Has every coordinator of vLLM use the one default group and ends the others; how many it ended. Nothing with more than one rank.

    Call it in the engine's process once the engine is built.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() != 1:
        return 0
    default = torch.distributed.group.WORLD
    for reference in parallel_state._groups.values():
        coordinator = reference()
        if coordinator is not None:
            coordinator.cpu_group = coordinator.device_group = default
    others = [group for group in torch.distributed.distributed_c10d._world.pg_map if group is not default]
    for group in others:
        torch.distributed.destroy_process_group(group)
    return len(others)
