"""What the simulated engine takes from its configuration and the model's folder: profile, limits, namespace, what it refuses.

Must not read weights: there may be many gigabytes of them, and nothing is computed.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

from tandem import __version__
from tandem.cluster_config import SIMULATED, read_section
from tandem.config import EngineConfig
from tandem.domain import EngineInfo, Sampling
from tandem.engine.model_files import resolve_model
from tandem.engine.simulated_physics import StepProfile
from tandem.errors import ConfigError, InvalidRequestError, Reason

_NO_DTYPE = "none"
_NOT_SIMULATED = {  # settings that need logits, by the value that asks for nothing
    "n": 1,
    "logprobs": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "structured_output": None,
}


def read_profile(config: EngineConfig) -> StepProfile:
    """The profile in `step_profile`, defaults where it names none. Raises ConfigError naming the key."""
    profile = read_section(StepProfile, config.step_profile, "step_profile.")
    profile.validate("step_profile.")
    return profile


def namespace_parts(config: EngineConfig) -> dict[str, str | int]:
    """All that decides a simulated block's bytes besides its tokens; no block of a real engine is ever found under it."""
    return {
        "engine": f"{SIMULATED} {__version__}",
        "model": xxhash.xxh3_128_hexdigest((resolve_model(config.model) / "config.json").read_bytes()),
        "block_size_tokens": config.block_size_tokens,
        "block_bytes": read_profile(config).block_bytes,
    }


def engine_info(config: EngineConfig, profile: StepProfile, folder: Path) -> EngineInfo:
    """The engine's limits. Raises ConfigError where config.json does not tell them, or one request may need more KV than there is."""
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
        settings = settings.get("text_config", settings)  # of models that see
        model_context, vocabulary, eos = settings["max_position_embeddings"], settings["vocab_size"], settings.get("eos_token_id")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"config.json of model {folder} does not tell its limits ({error!r})", reason=Reason.BAD_MODEL) from error
    context_tokens = config.context_tokens or int(model_context)
    if profile.kv_blocks * config.block_size_tokens < context_tokens:
        raise ConfigError(
            f"step_profile.kv_blocks = {profile.kv_blocks} hold {profile.kv_blocks * config.block_size_tokens} tokens, "
            f"and one request may have {context_tokens}: set context_tokens"
        )
    return EngineInfo(
        block_size_tokens=config.block_size_tokens,
        context_tokens=context_tokens,
        vocabulary_tokens=int(vocabulary),
        kv_blocks=profile.kv_blocks,
        kv_block_bytes=profile.block_bytes,
        dtype=_NO_DTYPE,
        engine=SIMULATED,
        hardware=SIMULATED,
        engine_version=__version__,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )


def check_simulated(sampling: Sampling) -> None:
    """Raises InvalidRequestError naming a setting that would need a model."""
    for name, nothing in _NOT_SIMULATED.items():
        if getattr(sampling, name) != nothing:
            raise InvalidRequestError(f"sampling.{name}", "is not simulated: this engine draws tokens without a model")
    if sampling.logit_bias:
        raise InvalidRequestError("sampling.logit_bias", "is not simulated: this engine draws tokens without a model")
