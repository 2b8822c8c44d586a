"""The workload that a load test's settings name, fitted to the model. Must not send anything."""

from dataclasses import replace

from tandem.bench.options import BenchOptions
from tandem.bench.target import ServedModel
from tandem.errors import ConfigError
from tandem.workload import (
    PlannedRequest,
    Prompts,
    TraceRow,
    clip_to_context,
    draw_requests,
    parse_trace,
    requests_of_trace,
    trace_block_tokens,
)


def read_trace(options: BenchOptions) -> list[TraceRow] | None:
    """The trace's rows; None where the workload is synthetic. Raises ConfigError where the file cannot be read or is no trace."""
    if options.trace is None:
        return None
    try:
        with options.trace.open(encoding="utf-8") as lines:
            return parse_trace(lines, options.trace.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace: cannot read {options.trace}: {error}") from error


def plan_requests(options: BenchOptions, rows: list[TraceRow] | None, model: ServedModel) -> tuple[list[PlannedRequest], list[str]]:
    """The requests, and warnings about them. A trace is cut to the model's context; a synthetic workload must fit: else ConfigError."""
    if rows is None:
        return _synthetic_requests(options, model), []
    requests = requests_of_trace(
        rows, rate_rps=options.rate_rps, scale=options.trace_scale, max_requests=options.requests, max_s=options.duration_s
    )
    if model.context_tokens is None:
        return requests, []
    requests, clipped = clip_to_context(requests, model.context_tokens)
    words = f"{clipped} of {len(requests)} requests of the trace were cut to the model's context of {model.context_tokens} tokens"
    return requests, [words] if clipped else []


def plan_prompts(options: BenchOptions) -> Prompts:
    """What the prompts hold."""
    block_tokens = options.shared_prefix_tokens if options.trace is None else trace_block_tokens(options.trace_scale)
    return Prompts(seed=options.seed, vocabulary_tokens=options.vocabulary_tokens, block_tokens=block_tokens)


def warmup_requests(requests: list[PlannedRequest], count: int) -> list[PlannedRequest]:
    """Requests of the workload's lengths, all at once, with prompts of their own."""
    like = [requests[number % len(requests)] for number in range(count)]
    return [replace(request, index=len(requests) + number, send_at_s=0.0, block_ids=()) for number, request in enumerate(like)]


def _synthetic_requests(options: BenchOptions, model: ServedModel) -> list[PlannedRequest]:
    prompt, output = options.prompt_lengths, options.output_lengths
    longest_tokens = prompt.high_tokens + output.high_tokens
    if model.context_tokens is not None and longest_tokens > model.context_tokens:
        raise ConfigError(
            f"--prompt-tokens and --output-tokens: {longest_tokens} tokens together are more than the {model.context_tokens} of {model.id}"
        )
    return draw_requests(
        options.synthetic_requests,
        options.synthetic_rate_rps,
        prompt,
        output,
        seed=options.seed,
        is_prefix_shared=options.shared_prefix_tokens > 0,
    )
