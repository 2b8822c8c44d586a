"""The shape of a pool's step times: which of tokens, pairs, requests and KV tokens cost how much, fitted online.

Must not know replicas or clocks: `steptime.py` holds how one replica differs, and drift.
"""

from collections import OrderedDict

from tandem.least_squares import solve_non_negative
from tandem.step_cost import StepCost
from tandem.step_sample import StepSample

_MAX_BUCKETS = 64
_BUCKET_DECAY = 0.96  # each bucket remembers about its last 25 steps
_HOLD_FRACTION = 1e-4  # below what 3 % noise leaves undetermined after some 20 steps
_SOLVE_EACH_UNTIL = 32  # then every 16th: a solution costs some 40 us, an observation alone 6
_SOLVE_EVERY = 16
_SHORTEST_S = 1e-5
_TELLING_PREFILL_TOKENS = 128  # what a hand-off leaves to recompute is at most a block: it does not tell what a prompt costs
_TELLING_DECODE_REQUESTS = 4  # one request does not tell what a batch costs
_SIZE = 5
_TERMS = _SIZE * (_SIZE + 1) // 2 + _SIZE

_Key = tuple[int, int, int, int]


class StepShape:
    """Weighted least squares on relative errors with bucketed retention.

    Steps are kept apart by size (of prefill, of pairs, of batch, of KV). A step makes only its own bucket forget, so an hour of constant
    load cannot wash out what other loads taught (wind-up), and directions that no bucket determines stay as they are. The bucket that
    was longest without a step goes first. Dynamo's planner keeps its samples by the same idea (algorithms.md, 3b).
    """

    def __init__(self, prior: StepCost) -> None:
        self._prior = (prior.base_s, prior.token_s, prior.pair_s, prior.request_s, prior.kv_token_s)
        self._scale = [1.0] * _SIZE
        self._buckets: OrderedDict[_Key, list[float]] = OrderedDict()
        self._total = [0.0] * _TERMS
        self._observations = 0
        self.prefills = 0  # steps seen so far with prefill enough to tell what it costs
        self.decodes = 0  # steps seen so far with a batch large enough to tell what decoding costs
        self.cost = prior  # the coefficients as last solved for

    @property
    def buckets(self) -> int:
        """Kinds of steps remembered; bounded."""
        return len(self._buckets)

    def observe(self, sample: StepSample) -> None:
        """Learns from one step; about 8 us."""
        tokens, pairs = sample.prefill_tokens, sample.prefill_pairs
        requests, kv_tokens = sample.decode_requests, sample.kv_tokens
        self.prefills += tokens >= _TELLING_PREFILL_TOKENS
        self.decodes += requests >= _TELLING_DECODE_REQUESTS
        inverse = 1.0 / max(sample.duration_s, _SHORTEST_S)
        p0, p1, p2, p3, p4 = self._prior
        a, b, c, d, e = p0 * inverse, p1 * tokens * inverse, p2 * pairs * inverse, p3 * requests * inverse, p4 * kv_tokens * inverse
        row = (a * a, a * b, a * c, a * d, a * e, b * b, b * c, b * d, b * e, c * c, c * d, c * e, d * d, d * e, e * e, a, b, c, d, e)
        key = (tokens.bit_length(), pairs.bit_length() // 3, requests.bit_length(), kv_tokens.bit_length() // 2)
        old = self._buckets.get(key)
        if old is None:
            self._buckets[key] = list(row)
            self._total = [have + new for have, new in zip(self._total, row, strict=True)]
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.popitem(last=False)
                self._sum_up()
        else:
            changed = [_BUCKET_DECAY * have + new for have, new in zip(old, row, strict=True)]
            self._total = [have + new - gone for have, new, gone in zip(self._total, changed, old, strict=True)]
            self._buckets[key] = changed
            self._buckets.move_to_end(key)
        self._observations += 1
        if self._observations <= _SOLVE_EACH_UNTIL or self._observations % _SOLVE_EVERY == 0:
            self._solve()

    def rescale(self, factor: float) -> None:
        """Everything remembered took `factor` times as long: the machine has changed, not the work."""
        moment_factor = 1.0 / factor
        gram_factor = moment_factor * moment_factor
        for key, sums in self._buckets.items():
            self._buckets[key] = [x * gram_factor for x in sums[:-_SIZE]] + [x * moment_factor for x in sums[-_SIZE:]]
        self._scale = [scale * factor for scale in self._scale]
        self._sum_up()
        self._solve()

    def fade(self, fraction: float) -> None:
        """Lets every bucket count only `fraction` as much; what is new counts in full. Rounding errors of the sums end here too."""
        for key, sums in self._buckets.items():
            self._buckets[key] = [fraction * x for x in sums]
        self._sum_up()

    def _sum_up(self) -> None:
        self._total = [sum(column) for column in zip(*self._buckets.values(), strict=True)] or [0.0] * _TERMS

    def _solve(self) -> None:
        aa, ab, ac, ad, ae, bb, bc, bd, be, cc, cd, ce, dd, de, ee, *moment = self._total
        gram = ((aa, ab, ac, ad, ae), (ab, bb, bc, bd, be), (ac, bc, cc, cd, ce), (ad, bd, cd, dd, de), (ae, be, ce, de, ee))
        self._scale = solve_non_negative(gram, moment, self._scale, _HOLD_FRACTION)
        base_s, token_s, pair_s, request_s, kv_token_s = (scale * prior for scale, prior in zip(self._scale, self._prior, strict=True))
        self.cost = StepCost(base_s=base_s, token_s=token_s, pair_s=pair_s, request_s=request_s, kv_token_s=kv_token_s)
