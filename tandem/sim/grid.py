"""The parameters that other routers' policies were tuned over, and which were best. Must not run anything.

The defaults in `router/policies.py` are the best of this grid: the least sum of the mean TTFTs in both settings, on the first
3,000 requests of the conversation trace, on two seeds that no comparison uses. To find them anew:
`tandem simulate --tune --trace PATH --requests 3000 --seeds 2`.
"""

from collections.abc import Mapping, Sequence
from itertools import product

from router.policies import DynamoParameters, LlmdParameters, PolicyParameters, PrebleParameters, SglangParameters

GRID: Mapping[str, Sequence[PolicyParameters]] = {
    "sglang_cache_aware": [
        PolicyParameters(sglang=SglangParameters(match_threshold=threshold, gap_requests=gap, gap_ratio=ratio))
        for threshold, gap, ratio in product((0.1, 0.3, 0.5), (1, 2, 4, 32), (1.1, 1.5))
    ],
    "dynamo_cost": [
        PolicyParameters(dynamo=DynamoParameters(prefill_scale=scale, overlap_credit=credit, request_blocks=blocks))
        for scale, credit, blocks in product((1.0, 4.0, 16.0), (0.5, 1.0), (0.0, 4.0, 16.0, 64.0))
    ],
    "llmd_weighted": [
        PolicyParameters(llmd=LlmdParameters(prefix_weight=prefix, queue_weight=queue, kv_weight=kv))
        for prefix, queue, kv in product((1.0, 3.0), (1.0, 2.0, 6.0), (0.0, 2.0, 10.0, 40.0))
    ],
    "preble_e2": [
        PolicyParameters(preble=PrebleParameters(window_s=window_s, uneven_ratio=ratio))
        for window_s, ratio in product((0.25, 0.5, 1.0, 5.0, 20.0, 180.0), (1.2, 2.0))
    ],
}
