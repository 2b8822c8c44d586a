"""Ends the process groups of an engine that is alone in them.

vLLM makes a dozen of gloo groups, and each has a thread that wakes 100 times a second: 1,500 wake-ups a second where nothing runs.
With one rank no collective ever runs.
"""

import torch.distributed
from vllm.distributed import parallel_state


def quiet_process_groups() -> int:
    """Ends the groups of all of vLLM's coordinators, and with gloo the default one too; how many. Nothing with more than one rank.

    Call it in the engine's process once the engine is built.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() != 1:
        return 0
    default = torch.distributed.group.WORLD
    is_needed = torch.distributed.get_backend() != "gloo"
    for reference in parallel_state._groups.values():
        coordinator = reference()
        if coordinator is None:
            continue
        if is_needed:
            coordinator.cpu_group = coordinator.device_group = default
        else:  # which is how vLLM marks a coordinator that has ended its groups
            del coordinator.cpu_group, coordinator.device_group
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    if not is_needed:
        torch.distributed.destroy_process_group()
        return len(groups)
    for group in groups:
        if group is not default:
            torch.distributed.destroy_process_group(group)
    return len(groups) - 1
